"""The low-rank linear map."""

from __future__ import annotations

from torch import Tensor, nn

from graft.config.roles import Role
from graft.linears.dense import Dense
from graft.linears.dense_config import DenseConfig
from graft.linears.low_rank_config import LowRankConfig


class LowRank(nn.Module):
    """``y = U (D x) + b`` with D [R, in] and U [out, R]: the factorised weights of 1301.3779 (Denil et al., 2013).

    Both factors are learned. They start normal with one standard deviation ``σ = (init_std / √R)^½``, with which the
    entries of ``U D``, sums of R products, have the standard deviation ``init_std`` that a dense matrix would have
    (deviation: the paper fixes one factor). A map that is to start at zero (``init_std`` 0) has U = 0 and a D that
    keeps the variance of x: with both at zero neither would ever get a gradient.

    Its cost is that of its two dense maps, 2·R·(in + out) FLOPs per row.

    Args:
        config: the rank.
        in_features: channels in.
        out_features: channels out.
        bias: add b.
        role: the role of both factors.
        init_std: standard deviation of the product's entries at start.
    """

    def __init__(
        self, config: LowRankConfig, in_features: int, out_features: int, *, bias: bool, role: Role, init_std: float
    ):
        super().__init__()
        self.config, self.role = config, role
        self.in_features, self.out_features = in_features, out_features
        std = (init_std / config.rank**0.5) ** 0.5
        down_std = std if init_std else in_features**-0.5
        self.down = Dense(DenseConfig(), in_features, config.rank, bias=False, role=role, init_std=down_std)
        self.up = Dense(DenseConfig(), config.rank, out_features, bias=bias, role=role, init_std=std)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        return self.up(self.down(input))
