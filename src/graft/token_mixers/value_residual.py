"""Values of an early layer mixed into those of later ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.config.roles import Role
from graft.initialization import Rng
from graft.shapes import Float

VALUE_RESIDUAL = "value_residual"
"""Name under which the first layer with a value residual publishes its values [B, T, K, H]."""


class ValueResidual(nn.Module):
    """Value residual learning (arXiv 2410.17897, "learnable" variant): v ← λ_own·v + λ_first·v_first.

    Deviations: both weights are scalars that start at 1/2; the first such layer, which has no earlier values, mixes
    with itself, so that its weights act as one learned factor that starts at 1 (every layer then has the same form).
    """

    role: Role = "scalar"

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.empty(()))
        self.first = nn.Parameter(torch.empty(()))

    def init_parameters(self, rng: Rng) -> None:
        """Both weights start at one half."""
        nn.init.constant_(self.own, 0.5)
        nn.init.constant_(self.first, 0.5)

    def forward(
        self, v_BTKH: Float[Tensor, "B T K H"], first_BTKH: Float[Tensor, "B T K H"]
    ) -> Float[Tensor, "B T K H"]:
        """The mixed values [B, T, K, H]."""
        assert v_BTKH.shape == first_BTKH.shape, "a model config sees to it that the heads agree"
        return self.own * v_BTKH + self.first * first_BTKH
