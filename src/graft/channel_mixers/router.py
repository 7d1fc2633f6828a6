"""Who goes where: scores of experts, the choice among them, and the bias that balances it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.channel_mixers.moe_config import MoeConfig
from graft.config.roles import Role
from graft.initialization import Rng, normal_
from graft.ops.autocast import full_precision
from graft.ops.routing import choose, scores
from graft.part import Site
from graft.shapes import Float


class Routing(NamedTuple):
    """A router's word on every position. Everything is in fp32 at least.

    Args:
        logits_BTE: before the scoring.
        probabilities_BTE: the scores, adding up to one over the experts.
        experts: [B, T, k] int64, the chosen ones, best first.
        weights: [B, T, k], how much each of them counts.
    """

    logits_BTE: Tensor
    probabilities_BTE: Tensor
    experts: Tensor
    weights: Tensor


class Router(nn.Module):
    """``scores = score(W x)``; the best few are chosen and weighted by their scores; fp32 at least, autocast or not.

    With a balance bias b (2408.15664) the best of ``scores + b`` are chosen, and weighted by their scores alone. After
    each update ``b_e ← b_e + rate · sign(mean load − load of e)``.

    Args:
        config: how it scores and chooses.
        site: where it stands.
    """

    role: Role = "router"
    balance_bias: Tensor | None

    def __init__(self, config: MoeConfig, site: Site):
        super().__init__()
        self.config = config
        self.init_std = site.init.std
        self.weight = nn.Parameter(torch.empty(config.num_experts, site.hidden_size))
        biased = config.balance_bias_rate is not None
        self.register_buffer("balance_bias", torch.empty(config.num_experts) if biased else None)

    def init_parameters(self, rng: Rng) -> None:
        normal_(self.weight, self.init_std, rng("weight"))
        if self.balance_bias is not None:
            nn.init.zeros_(self.balance_bias)

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Routing:
        config, wide = self.config, torch.promote_types(x_BTD.dtype, torch.float32)
        with full_precision(x_BTD.device):
            logits_BTE = F.linear(x_BTD.to(wide), self.weight.to(wide))
            scores_BTE = scores(logits_BTE, config.scoring)
            experts = choose(
                scores_BTE if self.balance_bias is None else scores_BTE + self.balance_bias,
                config.num_experts_per_tok,
                num_groups=config.num_groups,
                num_groups_kept=config.num_groups_per_tok or config.num_groups,
            )
            weights = scores_BTE.gather(-1, experts)
            if config.norm_topk_prob:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all underflow
            softmax = config.scoring == "softmax"
            probabilities_BTE = scores_BTE if softmax else scores_BTE / (scores_BTE.sum(-1, keepdim=True) + 1e-20)
            return Routing(logits_BTE, probabilities_BTE, experts, weights * config.routed_scaling_factor)

    @torch.no_grad()
    def balance(self, counts_E: Tensor) -> None:
        """Moves the bias by one step towards experts that were chosen less than the mean.

        Args:
            counts_E: how often each was chosen in the update.
        """
        rate = self.config.balance_bias_rate
        if self.balance_bias is None or not rate:
            return
        below_mean_E = (counts_E.sum() - counts_E * len(counts_E)).sign()  # of whole numbers: exact
        self.balance_bias += rate * below_mean_E.to(self.balance_bias.dtype)
