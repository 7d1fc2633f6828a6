"""What a part of one's own lacks is said when the model is built, with what to do; never a traceback of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from graft.config.base import knob
from graft.config.families import TokenMixerConfig
from graft.config.model import ModelConfig
from graft.config.roles import Role
from graft.errors import ConfigError
from graft.initialization import Rng
from graft.model import build_model
from graft.network.complete import check_modules
from graft.part import Context, Part, PartOutput, Site, State


class Whole(Part):
    """A part that lacks nothing."""

    role: Role = "scalar"

    def __init__(self, config: Any, site: Site):
        super().__init__()
        self.config = config
        self.factor = nn.Parameter(torch.empty(site.hidden_size))

    def init_parameters(self, rng: Rng) -> None:
        nn.init.ones_(self.factor)

    def forward(self, x_BTD: Tensor, ctx: Context, state: State = None) -> PartOutput:
        return PartOutput(x_BTD * self.factor)

    def flops_per_token(self, seq_len: int) -> float:
        return 0.0


class NoConfig(Whole):
    def __init__(self, config: Any, site: Site):
        super().__init__(config, site)
        del self.config


class NoRole(Whole):
    role = None  # pyright: ignore[reportAssignmentType]


class UnknownRole(Whole):
    param_roles: Mapping[str, str] = {"factor": "attn"}


class NoForward(Whole):
    forward = Part.forward


class NoFlops(Whole):
    flops_per_token = Part.flops_per_token


class PlainLinear(Whole):
    def __init__(self, config: Any, site: Site):
        super().__init__(config, site)
        self.proj = nn.Linear(3, 3)


class NoStart(Part):
    def __init__(self, config: Any, site: Site):
        super().__init__()
        self.config = config
        self.register_buffer("mask", torch.ones(3, 3).tril(), persistent=False)

    forward = Whole.forward
    flops_per_token = Whole.flops_per_token


class NoPart(nn.Module):
    def __init__(self, config: Any, site: Site):
        super().__init__()


class NoOutput(Whole):
    def forward(self, x_BTD: Tensor, ctx: Context, state: State = None) -> PartOutput:
        return x_BTD  # pyright: ignore[reportReturnType]


def network(made: type[nn.Module]) -> ModelConfig:
    """A model whose only token mixer is ``made``."""

    class OwnConfig(TokenMixerConfig):
        implementation = f"{__name__}:{made.__name__}"
        type: Literal["own"] = knob("own", "tag")

    blocks = {"b": [{"type": "own"}]}
    return ModelConfig.model_validate(
        {"hidden_size": 8, "num_layers": 1, "norm": {"type": "rms_norm"}, "blocks": blocks}
    )


@pytest.mark.usefixtures("registry_restored")
@pytest.mark.parametrize(
    ("made", "said"),
    [
        (NoConfig, r"layers\.0\.own\.part: NoConfig has no config; write self\.config = config"),
        (NoRole, r"layers\.0\.own\.part: NoRole says no role of its parameter factor; set role or param_roles"),
        (UnknownRole, "UnknownRole gives its parameter factor the role 'attn'; choose one of embedding, head"),
        (NoForward, "NoForward has no forward"),
        (NoFlops, "NoFlops has no flops_per_token"),
        (PlainLinear, r"part\.proj: Linear says no role of its parameter weight; .*site\.make_linear"),
        (NoStart, "NoStart owns mask but has no init_parameters; give it init_parameters"),
        (NoPart, r"OwnConfig: .*:NoPart makes NoPart, which is no graft\.part\.Part; derive it from Part"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_a_part_lacks_is_said(made: type[nn.Module], said: str, device: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_model(network(made), 11, seed=0, device=device)


@pytest.mark.usefixtures("registry_restored")
def test_a_part_that_lacks_nothing_is_built() -> None:
    assert build_model(network(Whole), 11, seed=0)(torch.zeros(1, 2, dtype=torch.int64)).shape == (1, 2, 11)


@pytest.mark.usefixtures("registry_restored")
def test_what_a_part_returns_instead_of_an_output_is_said() -> None:
    model = build_model(network(NoOutput), 11, seed=0)
    with pytest.raises(ConfigError, match=r"NoOutput\.forward returned a tensor; expected graft\.part\.PartOutput"):
        model(torch.zeros(1, 2, dtype=torch.int64))


def test_a_module_of_plain_torch_has_no_start() -> None:
    with pytest.raises(ConfigError, match=r"norm: .*BatchNorm1d says no role of its parameter weight"):
        check_modules(nn.ModuleDict({"norm": nn.BatchNorm1d(3)}))
