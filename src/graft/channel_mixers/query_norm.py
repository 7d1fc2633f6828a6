"""Batch normalisation of queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.config.roles import Role
from graft.initialization import Rng
from graft.shapes import Bool, Float

EPS = 1e-5
MOMENTUM = 0.1
"""PyTorch's defaults: added to the variance; weight of the newest step in the running statistics."""


class QueryBatchNorm(nn.Module):
    """Batch normalisation (1502.03167): ``y = (q − mean) / sqrt(var + eps) · w + b`` per channel.

    Training uses mean and biased variance over the unpadded positions of the micro-batch, evaluation the running ones.
    Deviations: running statistics move once per *update*, by the moments of all its micro-batches (`remember`), and not
    in forward: recomputed blocks and skipped steps leave them as they are.

    Args:
        size: channels.
    """

    role: Role = "norm"
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.register_buffer("running_mean", torch.empty(size))
        self.register_buffer("running_var", torch.empty(size))

    def init_parameters(self, rng: Rng) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)

    def forward(self, q_RQ: Float[Tensor, "R Q"], real_R: Bool[Tensor, " R"] | None) -> Float[Tensor, "R Q"]:
        """Same dtype out as in; ``real_R`` is False at padding."""
        mean, var = self._batch_statistics(q_RQ, real_R) if self.training else (self.running_mean, self.running_var)
        scale = self.weight.to(q_RQ.dtype) * torch.rsqrt(var.to(q_RQ.dtype) + EPS)
        return (q_RQ - mean.to(q_RQ.dtype)) * scale + self.bias.to(q_RQ.dtype)

    @staticmethod
    def _batch_statistics(q_RQ: Tensor, real_R: Tensor | None) -> tuple[Tensor, Tensor]:
        weight_R1 = torch.ones_like(q_RQ[:, :1]) if real_R is None else real_R[:, None].to(q_RQ.dtype)
        count = weight_R1.sum().clamp(min=1)
        mean = (q_RQ * weight_R1).sum(0) / count
        return mean, ((q_RQ - mean).square() * weight_R1).sum(0) / count

    @staticmethod
    @torch.no_grad()
    def moments(q_RQ: Tensor, real_R: Tensor | None) -> Tensor:
        """[3, Q]: sums over unpadded positions of 1, q and q², in double precision where the device has it."""
        wide = torch.float32 if q_RQ.device.type == "mps" else torch.float64
        weight_R1 = torch.ones_like(q_RQ[:, :1]) if real_R is None else real_R[:, None]
        q_RQ, weight_R1 = q_RQ.to(wide), weight_R1.to(wide)
        ones_RQ = torch.ones_like(q_RQ)
        return torch.stack([(power * weight_R1).sum(0) for power in (ones_RQ, q_RQ, q_RQ.square())])

    @torch.no_grad()
    def remember(self, moments_3Q: Tensor) -> None:
        """Moves the running statistics towards those of a step, given the sum of its `moments`."""
        count, first, second = moments_3Q
        mean = first / count.clamp(min=1)
        var = (second - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=1)  # unbiased, as PyTorch keeps it
        weight = MOMENTUM * (count > 0)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight.to(self.running_mean.dtype))
        self.running_var.lerp_(var.to(self.running_var.dtype), weight.to(self.running_var.dtype))
