"""The encoder presets: their exact sizes, and what each correction to the published models costs or saves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from graft.config.experiment import Experiment
from graft.config.load import load_experiment
from graft.contracts.registry import contracts_for
from graft.contracts.sequence import documents_do_not_meet, looks_both_ways, padding_does_not_matter
from graft.contracts.subject import Subject
from graft.cost import price
from graft.cost.counts import parameters_by_part
from graft.model import Model, build_model
from graft.token_mixers.titans_base import Titans

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "encoder_presets.md"
V = 50_000

TIED, TWICE, TERNARY = "head tied to the table", "values of retention twice as wide", "gains of the ternary maps"
MAMBA, NORMS = "Mamba-2 in place of a linear map", "norms where and as their papers have them"


@dataclass(frozen=True)
class Published:
    """What is known of a published model.

    Args:
        reported: its size as reported, in millions.
        width: hidden size (d).
        layers: physical layers.
        inner: inner width of a feed-forward network.
        size: channels of the table, where that is not d.
        taps: of the convolution over the table's vectors.
        experts: per layer; 1 = no router.
        hybrid: layers are retention, attention, retention, a linear map in Mamba's place, attention, ODE, in turn.
        biases: on all linear maps outside attention.
        norm_scalars: of one norm, beside two vectors.
    """

    reported: str
    width: int
    layers: int
    inner: int
    size: int | None = None
    taps: int = 0
    experts: int = 1
    hybrid: bool = False
    biases: bool = True
    norm_scalars: int = 0

    def norm(self) -> int:
        return 2 * self.width + self.norm_scalars

    def embedding(self) -> int:
        if self.size is None:
            return V * self.width
        return V * self.size + self.taps * self.size**2 + self.size + self.size * self.width

    def feed_forward(self) -> int:
        one = 2 * self.width * self.inner + (self.inner + self.width if self.biases else 0)
        return self.experts * one + (self.experts * self.width if self.experts > 1 else 0)

    def mixers(self) -> int:
        square = self.width**2
        if not self.hybrid:
            return self.layers * 4 * square
        retention, attention, linear, ode = 5 * square + self.norm(), 4 * square, square, 4 * square + self.norm()
        bias = self.width if self.biases else 0
        return self.layers // 6 * (2 * retention + 2 * attention + linear + bias + ode)

    def total(self) -> int:
        """Parameters, from the facts alone."""
        head = V * self.width + (V if self.biases else 0)
        norms = (2 * self.layers + 1) * self.norm()
        return self.embedding() + self.mixers() + self.layers * self.feed_forward() + norms + head


PUBLISHED = {
    "frankenstein": Published("352.07", 1024, 12, 2048, experts=4, hybrid=True, biases=False),
    "mini": Published("43.35", 384, 6, 768, 128, 3, experts=4, hybrid=True, norm_scalars=2),
    "bert_standard": Published("161.87", 768, 12, 3072),
    "bert_standard_hope": Published("161.87", 768, 12, 3072),
    "tinybert": Published("119.36", 768, 6, 3072),
    "embbert": Published("8.05", 128, 4, 512, 16, 32),
}

UNDONE = {
    TIED: ["model.head.tie_word_embeddings=false"],
    TERNARY: ["model.linear=null"],
    TWICE: ["model.blocks.retention.0.value_factor=1"],
}
"""Corrections that an override takes back."""

CORRECTIONS: dict[str, dict[str, int]] = {
    "frankenstein": {TIED: -51_200_000, TERNARY: 92_160, TWICE: 12_582_912, MAMBA: 11_102_912, NORMS: -12_263},
    "mini": {TIED: -19_200_000, TWICE: 884_736, MAMBA: 845_732, NORMS: -2_310},
    "bert_standard": {TIED: -38_400_000},
    "bert_standard_hope": {TIED: -38_400_000},
    "tinybert": {TIED: -38_400_000},
    "embbert": {TIED: -6_400_000},
}
"""Preset -> correction -> parameters more than without it, all those listed before it taken back already."""

SIZES = {
    "frankenstein": 324_639_449,
    "mini": 25_873_422,
    "bert_standard": 123_469_136,
    "bert_standard_hope": 123_469_136,
    "tinybert": 80_960_336,
    "embbert": 1_651_552,
}


def load(name: str, *overrides: str) -> Experiment:
    return load_experiment(ROOT / "presets" / "models" / f"{name}.yaml", list(overrides))


def on_meta(name: str, *overrides: str) -> Model:
    return build_model(load(name, *overrides).model, V, seed=0, device="meta")


@pytest.mark.parametrize("name", SIZES)
def test_exact_parameter_counts(name: str) -> None:
    assert on_meta(name).num_parameters() == SIZES[name]
    assert f"{SIZES[name]:,}" in (ROOT / "presets" / "models" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_facts_give_the_reported_size(name: str) -> None:
    assert f"{PUBLISHED[name].total() / 1e6:.2f}" == PUBLISHED[name].reported


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_presets_have_the_published_shape(name: str) -> None:
    published, model = PUBLISHED[name], load(name).model
    conv = model.embedding.conv
    assert (model.hidden_size, model.num_layers, model.embedding.size) == (
        published.width,
        published.layers,
        published.size,
    )
    assert (0 if conv is None else conv.kernel_size) == published.taps
    assert model.loops == (2 if published.hybrid else 1)
    assert model.bidirectional
    kinds = [tuple(part.type for part in parts) for parts in model.layers()]
    mixers = (
        ["retention", "attention", "retention", "mamba2", "attention", "ode"] if published.hybrid else ["attention"]
    )
    channel = "moe" if published.experts > 1 else "mlp"
    assert kinds == [(mixer, channel) for mixer in mixers] * (published.layers // len(mixers))
    for _, part in model.layers():
        assert part.intermediate_size == published.inner
        assert not part.gated
        assert part.bias == published.biases
        assert getattr(part, "num_experts", 1) == published.experts


@pytest.mark.parametrize("name", CORRECTIONS)
def test_each_correction_accounts_for_its_parameters(name: str) -> None:
    size, overrides = SIZES[name], []
    for correction, difference in CORRECTIONS[name].items():
        if correction in UNDONE:
            overrides += UNDONE[correction]
            without = on_meta(name, *overrides).num_parameters()
            assert size - without == difference, correction
            size = without
    remaining = {c: n for c, n in CORRECTIONS[name].items() if c not in UNDONE}
    assert size - sum(remaining.values()) == PUBLISHED[name].total()


@pytest.mark.parametrize("name", ["frankenstein", "mini"])
def test_what_no_override_takes_back(name: str) -> None:
    published, model = PUBLISHED[name], on_meta(name, "model.linear=null")
    linears = published.layers // 6 * (published.width**2 + (published.width if published.biases else 0))
    assert parameters_by_part(model)["mamba2"] - linears == CORRECTIONS[name][MAMBA]
    norms = [m for m in model.modules() if type(m).__name__ in ("DyT", "Derf")]
    ours = sum(p.numel() for norm in norms for p in norm.parameters())
    turns = published.layers // 6  # an ODE and two retentions in each, with a norm of their own
    theirs = (2 * published.layers + 1 + 3 * turns) * published.norm()
    assert ours - theirs == CORRECTIONS[name][NORMS]


def test_the_table_in_the_docs_is_true() -> None:
    text = DOC.read_text()
    for name, published in PUBLISHED.items():
        assert f"| {name} | as published | {published.reported} M reported | {published.total():,} |" in text
        size = published.total()
        for correction, difference in reversed(CORRECTIONS[name].items()):
            size += difference
            assert f"| | {correction} | {difference:+,} | {size:,} |" in text, (name, correction)
        assert size == SIZES[name]
        assert f"`{name}` | {SIZES[name]:,} |" in text


def test_hope_attention_is_titans_without_its_memory() -> None:
    """One has dropout, the other has memory to switch on; what they compute is the same."""
    tiny = ["model.hidden_size=16", "model.num_layers=2", "model.blocks.encoder.0.num_heads=2"]
    tiny.append("model.blocks.encoder.1.intermediate_size=8")
    titans = "{type: titans, neural_memory: false, num_heads: 2, position: {type: hope, theta: 1e4, damping: 0.01}}"
    first = Subject.of(load("bert_standard_hope", *tiny)).model
    second = Subject.of(load("bert_standard_hope", *tiny, f"model.blocks.encoder.0={titans}")).model
    names = {name: name.replace(".attention.", ".titans.") for name, _ in first.named_parameters()}
    second.load_state_dict({names.get(n, n): t for n, t in first.state_dict().items()})
    ids = torch.randint(31, (2, 9))
    torch.testing.assert_close(second(ids), first(ids))


HYBRID = [
    "model.num_layers=6",
    "model.blocks.retention.0.num_heads=2",
    "model.blocks.hope.0.num_heads=2",
    "model.blocks.mamba2.0={type: mamba2, d_state: 4, head_dim: 8}",
    "model.blocks.ode.0.mixer.num_heads=2",
    "model.blocks.ode.0.steps=1",
    *(f"model.blocks.{block}.1.intermediate_size=6" for block in ("retention", "hope", "mamba2", "ode")),
]
PLAIN = ["model.num_layers=2", "model.blocks.encoder.0.num_heads=2", "model.blocks.encoder.1.intermediate_size=24"]
REDUCED = {
    "frankenstein": HYBRID,
    "mini": [*HYBRID, "model.embedding.size=6"],
    "bert_standard": PLAIN,
    "bert_standard_hope": PLAIN,
    "tinybert": PLAIN,
    "embbert": [*PLAIN, "model.embedding.size=6"],
}


def reduced(name: str) -> Subject:
    return Subject.of(load(name, "model.hidden_size=16", *REDUCED[name]))


@pytest.mark.parametrize("name", [n for n in REDUCED if n not in ("frankenstein", "mini")])
def test_contracts_hold_at_reduced_width(name: str) -> None:
    for contract in contracts_for(reduced(name)):
        contract(reduced(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frankenstein", "mini"])
def test_contracts_hold_at_reduced_width_of_hybrids(name: str) -> None:
    for contract in contracts_for(reduced(name)):
        contract(reduced(name))


HYPERBOLIC = "position: {type: hope, theta: 1e4, damping: 0.01}"
MEMORIES = {
    "mac": f"form: mac, {HYPERBOLIC}",
    "mag": f"form: mag, sliding_window: 3, conv_size: 3, {HYPERBOLIC}",
    "mal": f"form: mal, sliding_window: 3, {HYPERBOLIC}",
}
"""What the published models called Titans attention, with the neural memory they had not."""


def with_memory(name: str, form: str) -> Subject:
    """A hybrid at reduced width, the memory of a form in its hyperbolic attention and inside its ODE."""
    titans = f"{{type: titans, num_heads: 2, chunk_size: 4, neural_memory: true, {MEMORIES[form]}}}"
    overrides = [*REDUCED[name], "model.hidden_size=16", f"model.blocks.hope.0={titans}"]
    return Subject.of(load(name, *overrides, "model.blocks.ode.0.solver=euler", f"model.blocks.ode.0.mixer={titans}"))


@pytest.mark.parametrize(("name", "form"), [("frankenstein", "mac"), ("mini", "mag"), ("frankenstein", "mal")])
def test_hybrids_take_neural_memories(name: str, form: str) -> None:
    subject = with_memory(name, form)
    memories = [module for module in subject.model.modules() if isinstance(module, Titans)]
    assert len(memories) == 3, "two in place of attention, one in the ODE"
    looks_both_ways(subject)
    documents_do_not_meet(subject)
    padding_does_not_matter(subject)


@pytest.mark.slow
@pytest.mark.parametrize("form", MEMORIES)
def test_contracts_hold_of_hybrids_with_neural_memories(form: str) -> None:
    subject = with_memory("frankenstein", form)
    for contract in contracts_for(subject):
        contract(subject)


@pytest.mark.slow
@pytest.mark.timeout(900)  # pricing an ODE rehearses each of its evaluations, on a busy machine for minutes
@pytest.mark.parametrize("name", SIZES)
def test_they_run_and_have_a_price_at_full_width(name: str) -> None:
    micro = load(name).micro_batch_size
    experiment = load(name, f"training.global_batch_size={micro}")  # one micro-batch to rehearse instead of two
    report = price(experiment)
    assert report.parameters.total == SIZES[name]
    assert report.memory_bytes.total > 16 * SIZES[name]  # weights, gradients, two moments
    model = build_model(experiment.model, V, seed=0).eval()
    ids, segments = torch.randint(V, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    segments[1, 7:] = 0
    with torch.no_grad():
        logits = model(ids, segment_ids_BT=segments)
        other = ids.clone()
        other[1, 7:] = 1
        assert torch.isfinite(logits).all()
        changed = model(other, segment_ids_BT=segments)
    torch.testing.assert_close(changed[1, :7], logits[1, :7])  # padding is not seen
    assert logits.shape == (2, 12, V)
