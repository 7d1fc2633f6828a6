"""Kernels from elsewhere: who gets which, what they are handed, and that the numbers stay.

The packages need a GPU; here stand-ins with their signatures run on the CPU, FlexAttention is PyTorch's own plain form.
`test_kernels_on_cuda.py` runs the real ones where there is a GPU.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import kernel_doubles
import pytest
import torch
from kernel_doubles import DIRECTIONS, NAMES, PARTS, config, packed
from torch import Tensor

from graft.api import train
from graft.contracts.subject import loud
from graft.errors import ConfigError
from graft.model import Model, build_model
from graft.network.kernels import kernels_in_use
from graft.ops import kernels
from graft.ops.kernels import Kernel, choose_kernel
from tiny_run import tiny

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # slow, and exact

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def model(*tags: str, bidirectional: bool = False) -> Model:
    built = build_model(config(*tags).replace(bidirectional=bidirectional), 31, seed=0)
    loud(built, 0)
    return built


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels run on the CPU, on the stand-ins."""
    kernel_doubles.install(monkeypatch)
    anywhere = tuple(replace(k, devices=("cpu",), dtypes=(torch.float32,)) for k in kernels.KERNELS)
    monkeypatch.setattr(kernels, "KERNELS", anywhere)


def outcome(built: Model, segments: Tensor | None, *, gradients: bool) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(0))
    built.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(gradients):
        logits = built(ids, segment_ids_BT=segments)
        real = torch.ones_like(ids, dtype=torch.bool) if segments is None else segments != 0
        if gradients:
            logits[real].sin().sum().backward()
    return logits[real].detach(), {n: p.grad.clone() for n, p in built.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("segments", [None, packed(12)], ids=["one document", "packed"])
@pytest.mark.parametrize(("tag", "bidirectional"), DIRECTIONS)
def test_the_numbers_are_graft_s(tag: str, bidirectional: bool, segments: Tensor | None) -> None:
    built = model(tag, bidirectional=bidirectional)
    gradients = tag != "attention"  # PyTorch's plain FlexAttention has no backward pass
    built.set_runtime(kernels="reference")
    logits, grads = outcome(built, segments, gradients=gradients)
    assert kernel_doubles.CALLS == []
    built.set_runtime(kernels=NAMES[tag])
    found, found_grads = outcome(built, segments, gradients=gradients)
    assert kernels_in_use(built.parts()) == {tag: NAMES[tag], "mlp": "graft"}
    assert bool(kernel_doubles.CALLS) == (tag != "attention")
    torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-4)
    assert found_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found_grads[name], grad, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("doubles")
def test_flex_is_asked_for_the_window_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from graft.ops import kernels_flex

    seen = []
    real = kernels_flex.flex_attention
    monkeypatch.setattr(kernels_flex, "flex_attention", lambda *given: seen.append(given[3]) or real(*given))
    plain = {**PARTS["attention"], "sliding_window": None, "logit_softcap": None, "position": {"type": "rope"}}
    both = config("attention").replace(
        num_layers=2, blocks={"a": [PARTS["attention"]], "b": [plain]}, layout=("a", "b")
    )
    built = build_model(both, 31, seed=0)
    built.set_runtime(kernels="flex")
    outcome(built, None, gradients=False)
    assert [visibility.window for visibility in seen] == [5]  # the fused kernel computes the other layer as it is


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("tag", PARTS)
def test_decoding_is_graft_s_own(tag: str) -> None:
    built = model(tag)
    built.set_runtime(kernels=NAMES[tag])
    ids = torch.randint(31, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = built(ids)
        kernel_doubles.CALLS.clear()
        state = built.init_state(1, 12)
        rows = [built.decode(piece, state)[0] for piece in ids.split([5, 1, 1, 5], dim=1)]
    assert kernel_doubles.CALLS == []
    torch.testing.assert_close(torch.cat(rows, 1), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("doubles")
def test_auto_takes_what_fits_and_a_run_says_so(tmp_path: Path) -> None:
    experiment = tiny(
        tmp_path,
        "model.blocks.main=[{type: retention, num_heads: 2}, {type: mlp, intermediate_size: 32}]",
        "training.max_steps=2",
        "evaluation.max_sequences=1",
    )
    said = io.StringIO()
    run = train(experiment, out=tmp_path / "run", stream=said)
    assert "kernels: retention fla, mlp graft\n" in said.getvalue()
    assert said.getvalue().count("kernels: ") == 1
    assert set(kernel_doubles.CALLS) == {"chunk_simple_gla"}
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "kernels"]
    assert event["parts"] == {"retention": "fla", "mlp": "graft"}
    assert kernels_in_use(run.model.parts())["retention"] == "fla"


def test_auto_on_a_cpu_is_graft_s_own() -> None:
    built = model("retention", "attention")
    built.set_runtime(kernels="auto")
    assert kernels_in_use(built.parts()) == {"retention": "graft", "mlp": "graft", "attention": "graft"}
    built.set_runtime(kernels="reference")
    assert set(kernels_in_use(built.parts()).values()) == {"reference"}


@pytest.mark.parametrize(
    ("tags", "name", "reason"),
    [
        (("retention",), "fla", "'fla' cannot compute retention: it runs on cuda, the model is on cpu"),
        (("mamba2", "retention"), "mamba_ssm", "'mamba_ssm' cannot compute mamba2: it runs on cuda"),
        (("retention",), "flex", "'flex' computes attention, the model has none"),
        (("attention",), "fla", "'fla' computes gated_deltanet and gla and retention, the model has none"),
        (("attention",), "nothing", "'nothing' computes nothing graft knows"),
    ],
)
def test_a_named_kernel_that_cannot_be_used_says_why(tags: tuple[str, ...], name: str, reason: str) -> None:
    built = model(*tags)
    with pytest.raises(ConfigError, match=reason) as error:
        built.set_runtime(kernels=name)
    assert error.value.where == "runtime.kernels"
    assert all(part.kernel is None for part in built.parts())


class TestChoosing:
    """`choose_kernel` over kernels made up here."""

    FIRST = Kernel("first", "p", "m:f", "json", "p", lambda part: part.trouble, devices=("cpu",))
    SECOND = Kernel("second", "p", "m:g", "json", "p", lambda _: None, devices=("cpu", "cuda"))

    class Part:
        trouble: str | None = None

    def choose(self, asked: str, *, tag: str = "p", device: torch.device = CPU, dtype: Any = torch.float32) -> Any:
        part = self.Part()
        return choose_kernel(tag, part, asked, device, dtype, kernels=(self.FIRST, self.SECOND))

    def test_auto_takes_the_first_that_fits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.choose("auto") is self.FIRST
        assert self.choose("auto", device=CUDA) is self.SECOND
        monkeypatch.setattr(self.Part, "trouble", "odd")
        assert self.choose("auto") is self.SECOND
        assert self.choose("auto", dtype=torch.float64) is None
        assert self.choose("auto", tag="other") is None

    def test_reference_takes_none(self) -> None:
        assert self.choose("reference") is None

    def test_a_name_takes_that_one_or_says_why_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.choose("second") is self.SECOND
        assert self.choose("second", tag="other") is None
        with pytest.raises(ConfigError, match=r"it computes in float32, bfloat16, float16, the run in float64"):
            self.choose("second", dtype=torch.float64)
        monkeypatch.setattr(self.Part, "trouble", "its heads are odd")
        with pytest.raises(ConfigError, match="'first' cannot compute p: its heads are odd"):
            self.choose("first")

    def test_a_missing_package_is_named(self) -> None:
        kernel = replace(self.SECOND, package="no_such_package", install="graft[x]")
        with pytest.raises(ConfigError, match=r"no_such_package is not installed \(pip install 'graft\[x\]'\)"):
            choose_kernel("p", None, "second", CPU, torch.float32, kernels=(kernel,))
        assert choose_kernel("p", None, "auto", CPU, torch.float32, kernels=(kernel,)) is None


OBSTACLES = [
    ("retention", {"head_dim": 12}, "head_dim 12 is no multiple of 16"),
    ("gla", {"head_dim": 512}, "head_dim 512 is no multiple of 16 up to 256"),
    ("attention", {"dropout": 0.1}, "no dropout"),
    ("attention", {"position": {"type": "hope"}}, "fade with distance"),
    ("attention", {"head_dim": 8}, "below 16"),
]


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize(("tag", "fields", "reason"), OBSTACLES)
def test_what_a_kernel_cannot_do(
    tag: str, fields: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PARTS, tag, PARTS[tag] | fields)
    built = model(tag)
    with pytest.raises(ConfigError, match=reason):
        built.set_runtime(kernels=NAMES[tag])
    built.set_runtime(kernels="auto")
    assert kernels_in_use(built.parts())[tag] == "graft"


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("tag", ["retention", "mamba2"])
def test_encoders_read_both_ways_by_themselves(tag: str) -> None:
    built = model(tag, bidirectional=True)
    with pytest.raises(ConfigError, match="an encoder reads both ways"):
        built.set_runtime(kernels=NAMES[tag])


@pytest.mark.usefixtures("doubles")
def test_a_layer_with_a_kernel_compiles(compiling: None) -> None:
    built = model("retention")
    built.set_runtime(kernels="fla")
    eager, _ = outcome(built, packed(12), gradients=False)
    kernel_doubles.CALLS.clear()
    built.set_runtime(compile=True)
    compiled, _ = outcome(built, packed(12), gradients=False)
    assert kernel_doubles.CALLS == ["chunk_simple_gla"]
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
