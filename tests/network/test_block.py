"""Residual branches: every placement by its formula, names that do not move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from graft.channel_mixers.mlp_config import MlpConfig
from graft.config.layers import branch_names
from graft.config.model import ModelConfig
from graft.initialization import initialize
from graft.linears.dense_config import DenseConfig
from graft.model import build_model
from graft.network.block import Block, Branch
from graft.part import Context, Part, PartOutput, Site, State, add_sums, parameter_roles

D = 8
CTX = Context(torch.zeros(2, 3, dtype=torch.int64), torch.arange(3).expand(2, 3))
MODEL = {"hidden_size": D, "num_layers": 1, "norm": {"type": "rms_norm"}}


def config(part: dict[str, Any] | None = None, **model: Any) -> ModelConfig:
    parts = [{"type": "mlp", "intermediate_size": 5, **(part or {})}]
    return ModelConfig.model_validate({**MODEL, **model, "blocks": {"only": parts}})


def site(model: ModelConfig) -> Site:
    return Site(D, 0, 1, 1, True, model.norm, DenseConfig(), model.init)


def branch(model: ModelConfig) -> Branch:
    module = Branch(model.blocks["only"][0], model, site(model))
    initialize(module, 0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def run(module: Branch, x: Tensor) -> Tensor:
    return module(x, CTX).y


def part(module: Branch, x: Tensor) -> Tensor:
    return module.part(x, CTX).y


def test_pre() -> None:
    module, x = branch(config()), torch.randn(2, 3, D)
    torch.testing.assert_close(run(module, x), x + part(module, module.norm(x)))


def test_post() -> None:
    module, x = branch(config(norm_placement="post")), torch.randn(2, 3, D)
    torch.testing.assert_close(run(module, x), module.post_norm(x + part(module, x)))


def test_sandwich() -> None:
    module, x = branch(config(norm_placement="sandwich")), torch.randn(2, 3, D)
    torch.testing.assert_close(run(module, x), x + module.output_norm(part(module, module.norm(x))))


def test_output() -> None:
    module, x = branch(config(norm_placement="output")), torch.randn(2, 3, D)
    torch.testing.assert_close(run(module, x), x + module.output_norm(part(module, x)))


def test_no_norm() -> None:
    module, x = branch(config({"norm_placement": "none", "residual_scale": 0.5})), torch.randn(2, 3, D)
    torch.testing.assert_close(run(module, x), x + 0.5 * part(module, x))
    assert not any("norm" in name for name, _ in module.named_parameters())
    with pytest.raises(ValidationError, match="norm does nothing here"):
        config({"norm_placement": "none", "norm": {"type": "layer_norm"}})


def test_scale_and_layer_scale() -> None:
    module, x = branch(config({"layer_scale": 0.1}, residual_scale=0.5)), torch.randn(2, 3, D)
    scaled = part(module, module.norm(x)) * module.layer_scale.weight * 0.5
    torch.testing.assert_close(run(module, x), x + scaled)
    assert parameter_roles(module)["layer_scale.weight"] == "scalar"


def test_layer_scale_starts_at_its_value() -> None:
    model = config({"layer_scale": 0.1})
    module = Branch(model.blocks["only"][0], model, site(model))
    initialize(module, 0)
    assert torch.equal(module.layer_scale.weight, torch.full((D,), 0.1))


def test_the_part_wins_over_the_model() -> None:
    own = {"norm_placement": "post", "residual_scale": 2.0, "norm": {"type": "layer_norm"}}
    module, x = branch(config(own, norm_placement="sandwich", residual_scale=7.0)), torch.randn(2, 3, D)
    assert module.norm is None
    assert type(module.post_norm).__name__ == "LayerNorm"
    torch.testing.assert_close(run(module, x), module.post_norm(x + 2.0 * part(module, x)))


def test_residual_dropout_acts_on_the_branch_in_training_only() -> None:
    module, x = branch(config({"residual_dropout": 0.5})), torch.randn(2, 3, D)
    kept = run(module, x) - x
    whole = run(module.eval(), x) - x
    dropped = kept == 0
    assert 0.2 < dropped.float().mean() < 0.8
    torch.testing.assert_close(kept[~dropped], 2 * whole[~dropped], rtol=1e-4, atol=1e-5)


def test_names_count_within_a_kind() -> None:
    mlp = MlpConfig(intermediate_size=4)
    attention = ModelConfig.model_validate(
        {**MODEL, "blocks": {"a": [{"type": "attention", "num_heads": 2, "position": {"type": "rope"}}]}}
    ).blocks["a"][0]
    assert branch_names((attention, mlp)) == ["attention", "mlp"]
    assert branch_names((mlp, attention, mlp, mlp)) == ["mlp", "attention", "mlp_2", "mlp_3"]


class Telltale(Part):
    """Publishes its input, reports what it was handed, counts positions."""

    def __init__(self, label: str):
        super().__init__()
        self.label = label
        self.seen: dict[str, Tensor] = {}
        self.updated: dict[str, Tensor] = {}

    def forward(self, x_BTD: Tensor, ctx: Context, state: State = None) -> PartOutput:
        self.seen = dict(ctx.published)
        count = torch.tensor(float(x_BTD.shape[0] * x_BTD.shape[1]))
        return PartOutput(
            x_BTD, (state or 0) + 1, {"count": count}, {self.label: x_BTD}, {"items": torch.tensor([2, 1])}
        )

    def after_update(self, usage: Mapping[str, Tensor]) -> None:
        self.updated = dict(usage)

    def flops_per_token(self, seq_len: int) -> float:
        return 0.0


def test_counts_add_up_over_loops_and_come_back_to_their_part() -> None:
    model = build_model(config(norm_placement="pre").replace(num_layers=2, loops=3), 7, seed=0)
    parts = [Telltale("a"), Telltale("b")]
    for block, part in zip(model.blocks(), parts, strict=True):
        block["mlp"].part = part
    usage = model.features(torch.zeros(1, 4, dtype=torch.int64)).usage
    assert {name: counts.tolist() for name, counts in usage.items()} == {
        "layers.0.mlp.items": [6, 3],
        "layers.1.mlp.items": [6, 3],
    }
    model.after_update({"layers.1.mlp.items": torch.tensor([5, 4])})
    assert parts[0].updated == {}
    assert parts[1].updated["items"].tolist() == [5, 4]


def test_state_sums_and_published_tensors_flow() -> None:
    model = config(norm_placement="pre").replace(blocks={"only": (MlpConfig(intermediate_size=4),) * 2})
    block = Block(model.branches()[0], model, site(model))
    initialize(block, 0)
    first, second = Telltale("first"), Telltale("second")
    block["mlp"].part, block["mlp_2"].part = first, second
    x = torch.randn(2, 3, D)
    out = block(x, CTX, {"mlp": 4, "mlp_2": 9})
    assert out.states == {"mlp": 5, "mlp_2": 10}
    assert out.aux["count"].item() == 12
    assert set(first.seen) == set()
    assert set(second.seen) == {"first"}
    assert set(out.published) == {"first", "second"}
    assert not CTX.published
    assert {name: counts.tolist() for name, counts in out.usage.items()} == {
        "mlp.items": [2, 1],
        "mlp_2.items": [2, 1],
    }


@pytest.mark.parametrize(
    ("a", "b", "total"), [({}, {"n": 1.0}, {"n": 1.0}), ({"n": 1.0, "m": 2.0}, {"n": 3.0}, {"n": 4.0, "m": 2.0})]
)
def test_add_sums(a: dict[str, float], b: dict[str, float], total: dict[str, float]) -> None:
    tensors = [{name: torch.tensor(value) for name, value in sums.items()} for sums in (a, b)]
    assert {name: value.item() for name, value in add_sums(*tensors).items()} == total
