"""Which chapters of a bank each position reads, and what keeps the choice spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.config.roles import Role
from graft.initialization import Rng, normal_
from graft.memories.memory_bank_config import MemoryBankConfig
from graft.memories.pooling import POOLINGS, PoolState
from graft.ops.autocast import full_precision
from graft.ops.kernels import Kernels
from graft.ops.router_losses import balance_sum, variance_sum, z_sum
from graft.ops.routing import choose
from graft.part import Site
from graft.shapes import Float, Int


class Choice(NamedTuple):
    """A router's word on every position, in fp32 at least; the chapters are numbered without the shared ones.

    Args:
        logits_BTE: scores of the chapters.
        probabilities_BTE: their softmax.
        chapters_BTC: the chosen ones, best first.
        weights_BTC: how much each of them counts.
    """

    logits_BTE: Tensor
    probabilities_BTE: Tensor
    chapters_BTC: Tensor
    weights_BTC: Tensor


class ChapterRouter(nn.Module):
    """``p = softmax(W h̄ + b)``; the best few chapters are read, weighted by ``p`` divided by its sum over them.

    ``h̄`` is the position itself or a mean of others (`graft.memories.pooling`); the mean is taken of ``W h``, which is
    the same and smaller to carry. Where there is nothing to average a learned vector stands for ``W h̄ + b``.

    Args:
        config: the chapters, and what chooses among them.
        site: the surroundings.
    """

    role: Role = "router"
    param_roles: Mapping[str, Role] = {"start": "bias"}

    def __init__(self, config: MemoryBankConfig, site: Site):
        super().__init__()
        self.config = config
        self.init_std = site.init.std
        self.pooling = POOLINGS[config.routing](config)
        E = config.routed_chapters
        self.weight = nn.Parameter(torch.empty(E, site.hidden_size))
        self.bias = nn.Parameter(torch.empty(E))
        may_be_empty = self.pooling is not None and self.pooling.may_be_empty
        self.start = nn.Parameter(torch.empty(E)) if may_be_empty else None

    def init_parameters(self, rng: Rng) -> None:
        normal_(self.weight, self.init_std, rng("weight"))
        nn.init.zeros_(self.bias)
        if self.start is not None:
            normal_(self.start, self.init_std, rng("start"))

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        segment_ids_BT: Int[Tensor, "B T"] | None,
        state: PoolState | None,
        *,
        kernels: Kernels = "auto",
    ) -> tuple[Choice, PoolState | None]:
        """The choice for every position, and the state after the last."""
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        with full_precision(x_BTD.device):
            scores_BTE = F.linear(x_BTD.to(wide), self.weight.to(wide))
            logits_BTE, state = self._pooled(scores_BTE, segment_ids_BT, state, kernels)
            probabilities_BTE = logits_BTE.softmax(-1)
            chapters_BTC = choose(probabilities_BTE, self.config.top_k_chapters)
            weights_BTC = probabilities_BTE.gather(-1, chapters_BTC)
            weights_BTC = weights_BTC / weights_BTC.sum(-1, keepdim=True) * self.config.routed_scaling_factor
        return Choice(logits_BTE, probabilities_BTE, chapters_BTC, weights_BTC), state

    def _pooled(
        self,
        scores_BTE: Tensor,
        segment_ids_BT: Tensor | None,
        state: PoolState | None,
        kernels: Kernels,
    ) -> tuple[Tensor, PoolState | None]:
        bias_E = self.bias.to(scores_BTE.dtype)
        if self.pooling is None:
            return scores_BTE + bias_E, None
        means_BTE, counts_BT, state = self.pooling(scores_BTE, segment_ids_BT, state, kernels=kernels)
        if self.start is None:
            return means_BTE + bias_E, state
        return torch.where(counts_BT[..., None] > 0, means_BTE + bias_E, self.start.to(bias_E.dtype)), state

    def losses(self, choice: Choice, real_BT: Tensor) -> dict[str, Tensor]:
        """Sums over positions, weighted by their coefficients: balance, variance of the mean probabilities, z."""
        config, probabilities_BTE = self.config, choice.probabilities_BTE
        losses: dict[str, Tensor] = {}
        with full_precision(real_BT.device):
            if config.router_aux_loss_coef:
                balance = balance_sum(probabilities_BTE, choice.chapters_BTC, real_BT) / config.top_k_chapters
                losses["chapter_balance"] = config.router_aux_loss_coef * balance
            if config.router_variance_loss_coef:
                losses["chapter_variance"] = config.router_variance_loss_coef * variance_sum(probabilities_BTE, real_BT)
            if config.router_z_loss_coef:
                losses["chapter_z"] = config.router_z_loss_coef * z_sum(choice.logits_BTE, real_BT)
        return losses
