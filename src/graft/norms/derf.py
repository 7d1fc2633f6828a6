"""Derf."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from graft.config.roles import Role
from graft.initialization import Rng
from graft.norms.derf_config import DerfConfig
from graft.shapes import Float


class Derf(nn.Module):
    """Dynamic erf (Stronger Normalization-Free Transformers, 2512.10938): ``y = γ ⊙ erf(αx + s) + β``, no statistics.

    α and s are learned scalars; γ = 1 and β = 0 at start. Computed in fp32 (fp64 for fp64 inputs), result in the
    input's dtype. No deviation from the paper.
    """

    role = "norm"
    param_roles: ClassVar[dict[str, Role]] = {"alpha": "scalar", "shift": "scalar"}

    def __init__(self, config: DerfConfig, size: int):
        super().__init__()
        self.config = config
        self.alpha = nn.Parameter(torch.empty(()))
        self.shift = nn.Parameter(torch.empty(()))
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))

    def init_parameters(self, rng: Rng) -> None:
        nn.init.constant_(self.alpha, self.config.alpha_init)
        nn.init.constant_(self.shift, self.config.shift_init)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        wide = torch.promote_types(x.dtype, torch.float32)
        inner = self.alpha.to(wide) * x.to(wide) + self.shift.to(wide)
        return (torch.erf(inner) * self.weight.to(wide) + self.bias.to(wide)).to(x.dtype)
