"""The plain linear map."""

from __future__ import annotations

from torch import Tensor, nn

from graft.config.families import LinearConfig
from graft.config.roles import Role
from graft.initialization import Rng, normal_
from graft.ops.one_row import linear


class PlainOperands(nn.Module):
    """x and W as they are.

    Args:
        config: nothing to choose.
        in_features: columns of W.
    """

    def __init__(self, config: LinearConfig, in_features: int):
        super().__init__()

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The operands of ``x Wᵀ``."""
        return x, weight


class Dense(nn.Linear):
    """``y = x Wᵀ + b``. W starts normal with standard deviation ``init_std``, b at zero.

    Args:
        config: nothing to choose.
        in_features: channels in.
        out_features: channels out.
        bias: add b.
        role: the weight's role; the bias has the role "bias".
        init_std: standard deviation of W at start.
    """

    def __init__(
        self, config: LinearConfig, in_features: int, out_features: int, *, bias: bool, role: Role, init_std: float
    ):
        super().__init__(in_features, out_features, bias=bias)
        self.config = config
        self.role = role
        self.init_std = init_std

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        return linear(input, self.weight, self.bias)

    def init_parameters(self, rng: Rng) -> None:
        normal_(self.weight, self.init_std, rng("weight"))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
