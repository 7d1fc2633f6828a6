"""LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.initialization import Rng
from graft.norms.layer_norm_config import LayerNormConfig
from graft.shapes import Float


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al., 1607.06450): ``y = (x − mean(x)) / sqrt(var(x) + eps) · w + b``.

    var is the biased variance. Statistics, gain and shift are applied in fp32 (fp64 for fp64 inputs); the result has
    the input's dtype. No deviation from the paper.
    """

    role = "norm"

    def __init__(self, config: LayerNormConfig, size: int):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if config.bias else None

    def init_parameters(self, rng: Rng) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        y = F.layer_norm(x.to(wide), self.weight.shape, self.weight.to(wide), bias, self.config.eps)
        return y.to(x.dtype)
