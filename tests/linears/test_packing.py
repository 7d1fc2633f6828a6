"""Packed layers: the same numbers as the layer that was trained, from two bits per weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graft.channel_mixers.experts import ExpertLinear
from graft.channel_mixers.packed_experts import PackedExpertLinear
from graft.config.model import ModelConfig
from graft.contracts.subject import loud
from graft.errors import ConfigError
from graft.initialization import initialize
from graft.linears.bitlinear import BitLinear
from graft.linears.bitlinear_config import BitLinearConfig
from graft.linears.packed_ternary import PackedTernary
from graft.linears.packing import pack_ternary
from graft.model import Model, build_model
from graft.ops.routing import sort_slots
from graft.part import linear_flops


def layer(*, columns: int = 24, bias: bool = True, **fields: Any) -> BitLinear:
    module = BitLinearConfig.model_validate({"type": "bitlinear", **fields}).build(
        columns, 16, bias=bias, role="mlp", init_std=0.3
    )
    initialize(module, 0)
    loud(module, 0)
    return module.requires_grad_(False)


def network(linear: dict[str, Any] | None = None, dtype: torch.dtype = torch.float64, **fields: Any) -> Model:
    attention = {"type": "attention", "num_heads": 2, "position": {"type": "rope"}}
    data = {
        "hidden_size": 16,
        "num_layers": 2,
        "norm": {"type": "rms_norm"},
        "linear": linear or {"type": "bitlinear"},
        "blocks": {"b": [attention, {"type": "mlp", "intermediate_size": 24, "bias": True}]},
        **fields,
    }
    model = build_model(ModelConfig.model_validate(data), 31, seed=0, dtype=dtype)
    loud(model, 0)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("columns", [24, 13, 3])
@pytest.mark.parametrize("norm", [None, {"type": "rms_norm"}])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5)])
def test_a_packed_layer_computes_the_same(shape: tuple[int, int], norm: dict[str, Any] | None, columns: int) -> None:
    trained, x = layer(columns=columns, norm=norm), torch.randn(*shape, columns)
    packed = trained.packed()
    expected = trained(x)
    torch.testing.assert_close(packed(x), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    packed.kernels = "reference"
    assert torch.equal(packed(x), expected)


MOE = {"type": "moe", "num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 20, "num_shared_experts": 1}


def experts_of(model: Model, kind: type[nn.Module] = ExpertLinear) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, kind)]


@pytest.mark.parametrize("chosen", [[[3, 0]], [[5, 2], [2, 0], [5, 1], [0, 2], [2, 1]]], ids=["few rows", "many"])
@pytest.mark.parametrize("linear", [{}, {"norm": None}], ids=["norm", "no norm"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [16, 13, 3])
def test_packed_experts_compute_the_same(width: int, bias: bool, linear: dict[str, Any], chosen: list[Any]) -> None:
    """Fewer rows than experts and more, experts without rows, widths that fill no byte."""
    blocks, kind = {"b": [{**MOE, "bias": bias}]}, {"type": "bitlinear", **linear}
    model = network(kind, torch.float32, hidden_size=width, num_layers=1, blocks=blocks)
    trained = experts_of(model)[0]
    slots = sort_slots(torch.tensor(chosen), 6)
    x = torch.randn(len(slots.expert_M), width)
    packed, expected = trained.packed(), trained(x, slots, "reference")
    assert torch.equal(packed(x, slots, "reference"), expected)
    torch.testing.assert_close(packed(x, slots, "auto"), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):  # whole numbers stay exact
        torch.testing.assert_close(packed(x, slots, "auto"), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_packed_mixture_of_experts_gives_the_same_logits_from_less() -> None:
    ids = torch.randint(31, (2, 12))
    attention = {"type": "attention", "num_heads": 2, "position": {"type": "rope"}}
    model = network(blocks={"b": [attention, MOE]}, linears={"attention": {"type": "dense"}, "mlp": {"type": "dense"}})
    expected, flops = model(ids), [part.flops_per_token(12) for part in model.parts()]
    weights = sum(layer.weight.numel() for layer in experts_of(model))
    names = pack_ternary(model)
    assert len(names) == 2 * 3
    assert all(".experts." in name for name in names)
    assert not experts_of(model)
    packed = experts_of(model, PackedExpertLinear)
    assert sum(layer.packed.numel() for layer in packed) == weights // 4
    torch.testing.assert_close(model(ids), expected, rtol=1e-9, atol=1e-9)
    logits, _ = model.decode(ids, model.init_state(2, 12))
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert [part.flops_per_token(12) for part in model.parts()] == flops


def test_weights_take_two_bits() -> None:
    trained = layer(columns=32, bias=False, norm=None)
    state = trained.packed().state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == {"packed": (16, 8), "scale": (1, 1)}
    assert state["packed"].dtype == torch.uint8
    assert linear_flops(trained.packed()) == linear_flops(trained)


@torch.no_grad()
def test_a_packed_model_gives_the_same_logits() -> None:
    ids = torch.randint(31, (2, 12))
    model = network()
    model.set_runtime(kernels="reference")
    expected = model(ids)
    assert len(pack_ternary(model)) == 2 * (4 + 3)
    model.set_runtime(kernels="reference")
    assert torch.equal(model(ids), expected)
    model.set_runtime(kernels="auto")
    torch.testing.assert_close(model(ids), expected, rtol=1e-9, atol=1e-9)
    state = model.init_state(2, 12)
    steps = []
    for token in ids.split(1, dim=1):
        logits, state = model.decode(token, state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-9, atol=1e-9)


def test_only_ternary_layers_are_packed() -> None:
    head = {"tie_word_embeddings": False}
    model = network({"type": "bitlinear"}, head=head, linears={"attention": {"type": "dense"}})
    before = dict(model.state_dict())
    names = pack_ternary(model)
    assert all(".mlp.part." in name for name in names)
    after = model.state_dict()
    changed = {n for n in before if n not in after or not torch.equal(before[n], after[n])}
    assert changed == {f"{name}.{k}" for name in names for k in ("weight", "operands.norm.weight")}
    assert {n for n in after if n not in before} == {
        f"{name}.{k}" for name in names for k in ("packed", "scale", "norm.weight")
    }
    kept: list[Tensor] = [model.embedding.weight, model.head_weight()]
    assert all(t.dtype == torch.float64 for t in kept)
    assert not any(isinstance(m, BitLinear) for m in model.modules())


def test_a_model_without_ternary_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="no ternary layer"):
        pack_ternary(network({"type": "dense"}))


def test_a_model_that_still_warms_in_is_refused() -> None:
    model = network({"type": "bitlinear", "warmup_steps": 3})
    with pytest.raises(ConfigError, match="0 of its 3 warm-up updates"):
        pack_ternary(model)
    for _ in range(3):
        model.after_update({})
    ids = torch.randint(31, (2, 12))
    expected = model(ids)
    pack_ternary(model)
    torch.testing.assert_close(model(ids), expected, rtol=1e-9, atol=1e-9)


def test_a_model_on_the_meta_device_gets_empty_layers() -> None:
    with torch.device("meta"):
        module = nn.Sequential(BitLinearConfig(warmup_steps=2).build(8, 4, bias=True, role="mlp", init_std=0.1))
    pack_ternary(module)
    assert isinstance(module[0], PackedTernary)
    assert all(t.is_meta for t in module.state_dict().values())
