"""What chooses chapters: every routing against its definition, in documents, padding and decoding; losses; the leak."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from graft.config.advice import marks, warnings
from graft.config.load import load_experiment_from_dict
from graft.config.model import InitConfig, ModelConfig
from graft.contracts import sequence
from graft.contracts.registry import contracts_for
from graft.contracts.subject import ContractBroken, Subject, loud
from graft.initialization import initialize
from graft.linears.dense_config import DenseConfig
from graft.memories.chapter_router import ChapterRouter
from graft.memories.memory_bank_config import MemoryBankConfig
from graft.memories.pooling import Chunk, Pooling, Prefix, Rolling, Sequence
from graft.norms.rms_norm_config import RMSNormConfig
from graft.objectives.causal_lm_config import CausalLMConfig
from graft.part import Context, Site

POOLINGS: dict[str, Pooling] = {
    "rolling": Rolling(3),
    "rolling over one": Rolling(1),
    "chunk": Chunk(3),
    "chunk of one": Chunk(1),
    "prefix": Prefix(2),
    "sequence": Sequence(),
}


def averaged(name: str, document: list[int], i: int) -> list[int]:
    """The columns whose mean position ``i`` of a document (its columns in order) is routed by: the definitions."""
    if name == "rolling":
        return document[max(0, i - 2) : i + 1]
    if name == "rolling over one":
        return [document[i]]
    if name == "chunk":
        return document[(i // 3 - 1) * 3 : i // 3 * 3] if i >= 3 else []
    if name == "chunk of one":
        return [document[i - 1]] if i else []
    if name == "prefix":
        return document[:2] if i >= 2 else []
    return document


def expected_means(name: str, scores: Tensor, segments: list[int]) -> tuple[Tensor, Tensor]:
    means, counts = torch.zeros_like(scores), torch.zeros(len(segments), dtype=scores.dtype)
    for segment in {s for s in segments if s}:
        document = [t for t, s in enumerate(segments) if s == segment]
        for i, t in enumerate(document):
            columns = averaged(name, document, i)
            counts[t] = len(columns)
            if columns:
                means[t] = scores[columns].mean(0)
    return means, counts


@st.composite
def rows(draw: st.DrawFn) -> list[int]:
    """Document numbers of a row: a few documents in any order of numbers, padding between them."""
    numbers = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True))
    row: list[int] = []
    for number in numbers:
        row += [0] * draw(st.integers(0, 2)) + [number] * draw(st.integers(1, 8))
    return row + [0] * draw(st.integers(0, 2))


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", POOLINGS)
@settings(max_examples=25)
@given(rows())
def test_means_are_those_of_the_definition(name: str, kernels: Any, row: list[int]) -> None:
    scores = torch.randn(1, len(row), 3, dtype=torch.float64)
    means, counts, _ = POOLINGS[name](scores, torch.tensor([row]), None, kernels=kernels)
    expected, numbers = expected_means(name, scores[0], row)
    real = torch.tensor(row) != 0
    torch.testing.assert_close(counts[0][real], numbers[real])
    torch.testing.assert_close(means[0][real], expected[real], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in POOLINGS if name != "sequence"])
@settings(max_examples=25)
@given(rows(), st.data())
def test_going_on_from_a_state_equals_the_whole_row(name: str, row: list[int], data: st.DataObject) -> None:
    pooling, segments = POOLINGS[name], torch.tensor([row])
    scores = torch.randn(1, len(row), 3, dtype=torch.float64)
    whole, counts, none = pooling(scores, segments, None)
    assert none is None
    state = pooling.empty_state(1, 3, device=scores.device, dtype=scores.dtype)
    done = 0
    while done < len(row):
        size = data.draw(st.integers(1, len(row) - done))
        part, part_counts, state = pooling(scores[:, done : done + size], segments[:, done : done + size], state)
        here = (segments[0] != 0)[done : done + size]
        torch.testing.assert_close(part[0][here], whole[0, done : done + size][here], rtol=1e-10, atol=1e-10)
        assert torch.equal(part_counts[0][here], counts[0, done : done + size][here])
        done += size


def test_a_document_alone_needs_no_numbers() -> None:
    scores = torch.randn(2, 9, 3, dtype=torch.float64)
    for pooling in POOLINGS.values():
        torch.testing.assert_close(pooling(scores, None, None)[0], pooling(scores, torch.full((2, 9), 4), None)[0])


def router(**fields: Any) -> ChapterRouter:
    fields = {"num_slots": 8, "num_chapters": 4, "top_k_chapters": 2, **fields}
    config = MemoryBankConfig.model_validate({"type": "memory_bank", **fields})
    site = Site(6, 0, 2, 4, True, RMSNormConfig(), DenseConfig(), InitConfig(std=0.5))
    made = ChapterRouter(config, site).double()
    initialize(made, seed=0)
    loud(made, 0)
    return made


def test_a_learned_vector_stands_in_where_there_is_nothing_to_average() -> None:
    made = router(routing="prefix", routing_prefix_len=3)
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    choice, _ = made(x, None, None)
    assert made.start is not None
    assert torch.equal(choice.logits_BTE[0, :3], made.start.expand(3, -1))
    mean = x[0, :3].mean(0) @ made.weight.T + made.bias  # the mean of scores is the score of the mean
    torch.testing.assert_close(choice.logits_BTE[0, 3:], mean.expand(2, -1))


def test_losses_in_closed_form() -> None:
    made = router(router_aux_loss_coef=0.5, router_variance_loss_coef=0.25, router_z_loss_coef=0.125)
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    real = torch.ones(3, 7, dtype=torch.bool)
    real[0, 4:] = False
    choice, _ = made(x, None, None)
    balance = variance = z = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        p, n = choice.probabilities_BTE[row][real[row]], int(real[row].sum())
        chosen = torch.nn.functional.one_hot(choice.chapters_BTC[row][real[row]], 4).sum(1).double()
        balance = balance + n * 4 * ((chosen.mean(0) / 2) * p.mean(0)).sum()
        variance = variance + n * p.mean(0).var(correction=0) / p.mean(0).mean() ** 2
        z = z + choice.logits_BTE[row][real[row]].logsumexp(-1).square().sum()
    losses = made.losses(choice, real)
    assert losses.keys() == {"chapter_balance", "chapter_variance", "chapter_z"}
    for name, expected in (("balance", 0.5 * balance), ("variance", 0.25 * variance), ("z", 0.125 * z)):
        torch.testing.assert_close(losses[f"chapter_{name}"], expected)
        (grad,) = torch.autograd.grad(losses[f"chapter_{name}"], made.weight, retain_graph=True)
        assert grad.any()


def test_losses_of_even_use() -> None:
    """Alike: the balance loss is 1 per position, whatever the number of choices, and the variance 0."""
    made = router(router_variance_loss_coef=1.0, router_aux_loss_coef=1.0, num_chapters=2, top_k_chapters=2)
    with torch.no_grad():
        made.weight.zero_()
        made.bias.zero_()
    choice, _ = made(torch.randn(2, 5, 6, dtype=torch.float64), None, None)
    losses = made.losses(choice, torch.ones(2, 5, dtype=torch.bool))
    torch.testing.assert_close(losses["chapter_balance"], torch.tensor(10.0, dtype=torch.float64))
    torch.testing.assert_close(losses["chapter_variance"], torch.tensor(0.0, dtype=torch.float64), atol=1e-12, rtol=0)


def test_usage_counts_real_positions_in_training_alone() -> None:
    config = MemoryBankConfig(num_slots=12, num_heads=2, num_chapters=6, top_k_chapters=2, num_shared_chapters=1)
    part = config.build(Site(6, 0, 2, 4, True, RMSNormConfig(), DenseConfig(), InitConfig()))
    initialize(part, seed=0)
    segments = torch.tensor([[1, 1, 1, 2, 0], [3, 3, 0, 0, 0]])
    ctx = Context(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64), segments)
    out = part.train()(torch.randn(2, 5, 6), ctx)
    assert out.usage["chapters"].shape == (5,)  # those that are chosen among
    assert out.usage["chapters"].sum() == 6 * 2
    assert not part.eval()(torch.randn(2, 5, 6), ctx).usage


def data(routing: str, *, bidirectional: bool = False, **fields: Any) -> dict[str, Any]:
    memory = {"type": "memory_bank", "num_slots": 8, "num_heads": 2, "num_chapters": 4, "top_k_chapters": 2}
    attention = {"type": "attention", "num_heads": 2, "position": {"type": "rope"}}
    return {
        "hidden_size": 8,
        "num_layers": 2,
        "bidirectional": bidirectional,
        "norm": {"type": "rms_norm"},
        "blocks": {"b": [attention, {**memory, "routing": routing, **fields}]},
    }


LEAKY = {"routing": "sequence", "allow_noncausal_routing": True}


def test_sequence_routing_leaks_in_a_decoder_and_is_refused() -> None:
    with pytest.raises(ValidationError, match="tells every position"):
        ModelConfig.model_validate(data("sequence"))
    with pytest.raises(ValidationError, match="may look ahead anyway"):
        ModelConfig.model_validate(data(**LEAKY, bidirectional=True))
    with pytest.raises(ValidationError, match="does nothing here"):
        ModelConfig.model_validate(data("token", allow_noncausal_routing=True))
    leaky = ModelConfig.model_validate(data(**LEAKY))
    assert leaky.leaks_future
    with pytest.raises(ContractBroken, match="comes later"):
        sequence.never_looks_ahead(Subject(leaky, CausalLMConfig()))
    for routing in ("token", "rolling", "chunk", "prefix"):
        assert not ModelConfig.model_validate(data(routing)).leaks_future


def test_a_leak_inside_another_part_or_an_override_is_seen() -> None:
    memory = data("sequence")["blocks"]["b"][1]
    inside = {
        **data("token"),
        "blocks": {"b": [{"type": "ode", "branches": [data("token")["blocks"]["b"][0], memory]}]},
    }
    with pytest.raises(ValidationError, match="tells every position"):
        ModelConfig.model_validate(inside)
    memory["allow_noncausal_routing"] = True
    assert ModelConfig.model_validate(inside).leaks_future
    overridden = {**data("token"), "overrides": {"1": {"memory_bank.routing": "sequence"}}}
    with pytest.raises(ValidationError, match="layer 1: sequence routing"):
        ModelConfig.model_validate(overridden)
    assert not ModelConfig.model_validate(data(**LEAKY, layers="none")).leaks_future


def test_sequence_routing_in_an_encoder_holds_every_contract() -> None:
    subject = Subject(ModelConfig.model_validate(data("sequence", bidirectional=True)), CausalLMConfig())
    for contract in contracts_for(subject):
        contract(subject)


def test_a_leaky_run_is_marked() -> None:
    def experiment(model: dict[str, Any]) -> Any:
        source = {"type": "embedded", "max_characters": 100_000}
        return load_experiment_from_dict(
            {
                "model": model,
                "objective": {"type": "causal_lm"},
                "data": {"source": source, "tokenizer": {"type": "bytes"}, "seq_len": 32},
                "optimizer": {"type": "adamw", "learning_rate": 1e-3},
                "schedule": {"type": "constant", "warmup_steps": 1},
                "training": {"max_steps": 10, "global_batch_size": 2},
            }
        )

    leaky, clean = experiment(data(**LEAKY)), experiment(data("token"))
    assert marks(leaky.model) == {"leaks_future": True}
    assert marks(clean.model) == {}
    assert any(re.match(r"model\.blocks\.b\.1\.type: .*reads the future", line) for line in warnings(leaky))
    assert not any("future" in line for line in warnings(clean))
