"""Dynamic Tanh."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from graft.config.roles import Role
from graft.initialization import Rng
from graft.norms.dyt_config import DyTConfig
from graft.shapes import Float


class DyT(nn.Module):
    """Dynamic Tanh (Transformers without Normalization, 2503.10622): ``y = γ ⊙ tanh(αx) + β``, no statistics.

    α is one learned scalar; γ = 1 and β = 0 at start. Computed in fp32 (fp64 for fp64 inputs), result in the input's
    dtype. Deviation: the paper's language models also have a learned factor on the embedding, started at sqrt(D);
    here that factor is fixed, ``model.embedding.scale``.
    """

    role = "norm"
    param_roles: ClassVar[dict[str, Role]] = {"alpha": "scalar"}

    def __init__(self, config: DyTConfig, size: int):
        super().__init__()
        self.config = config
        self.alpha = nn.Parameter(torch.empty(()))
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))

    def init_parameters(self, rng: Rng) -> None:
        nn.init.constant_(self.alpha, self.config.alpha_init)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = torch.tanh(self.alpha.to(wide) * x.to(wide)) * self.weight.to(wide) + self.bias.to(wide)
        return y.to(x.dtype)
