"""RMSNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.initialization import Rng
from graft.norms.rms_norm_config import RMSNormConfig
from graft.shapes import Float


class RMSNorm(nn.Module):
    """Root mean square layer normalisation (Zhang and Sennrich, 1910.07467): ``y = x / sqrt(mean(x²) + eps) · g``.

    The mean and the division are computed in fp32 (fp64 for fp64 inputs), the result has the input's dtype.
    Two conventions for the gain, which round differently below fp32; each follows the models it comes from:

    - plain (Llama, Qwen): ``g = w``, w = 1 at start; the normed value is rounded to the input's dtype, then multiplied.
    - ``unit_offset`` (Gemma): ``g = 1 + w``, w = 0 at start; multiplied in fp32, then rounded.

    Deviation from the paper: eps inside the root, which the paper does not have.
    """

    role = "norm"

    def __init__(self, config: RMSNormConfig, size: int):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(size))

    def init_parameters(self, rng: Rng) -> None:
        nn.init.constant_(self.weight, 0.0 if self.config.unit_offset else 1.0)

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        shape, eps = self.weight.shape, self.config.eps
        if self.config.unit_offset:
            return F.rms_norm(wide, shape, 1.0 + self.weight.to(wide.dtype), eps).to(x.dtype)
        if wide.dtype == x.dtype == self.weight.dtype:  # nothing is rounded in between: one fused call is the same
            return F.rms_norm(x, shape, self.weight, eps)
        return F.rms_norm(wide, shape, None, eps).to(x.dtype) * self.weight.to(x.dtype)
