"""Packed layers: the same numbers as the layer that was trained, from two bits per weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graft.config.model import ModelConfig
from graft.contracts.subject import loud
from graft.errors import ConfigError
from graft.initialization import initialize
from graft.linears.bitlinear import BitLinear
from graft.linears.bitlinear_config import BitLinearConfig
from graft.linears.packed_ternary import PackedTernary
from graft.linears.packing import pack_ternary
from graft.model import Model, build_model
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
