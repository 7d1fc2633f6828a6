"""Differential attention as a part."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.config.roles import Role
from graft.initialization import Rng, normal_
from graft.ops.attention import attention
from graft.ops.attention_mask import Scoring, Visibility
from graft.part import Site
from graft.token_mixers.differential_config import DifferentialConfig
from graft.token_mixers.heads import MultiHead, visible_pairs


def initial_lambda(layer_idx: int) -> float:
    """λ_init of a layer, counted from 0: 0.2 in the first, towards 0.8 in deep ones."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer_idx)


class Differential(MultiHead):
    """Differential attention (Differential Transformer, arXiv 2410.05258, section 2.1).

    ``(softmax(q1·k1 / √H) − λ·softmax(q2·k2 / √H)) v`` per pair of heads, then an RMSNorm over each pair's channels
    without weights, times ``1 − λ_init``, then o_proj. ``λ = exp(λ_q1·λ_k1) − exp(λ_q2·λ_k2) + λ_init``, four learned
    vectors per layer; ``λ_init = 0.8 − 0.6·exp(−0.3·layer_idx)`` with layers counted from 0. Values of a pair are as
    wide as its two heads together, so that the matrices are those of ordinary attention.

    Conventions (those of transformers' DiffLlama, whose weights fit by name): heads n and n + N/2 are a pair, and so
    are key heads and the halves of values; num_heads counts single heads, two per head of the paper.
    Deviations: pairs are not neighbours (2n, 2n + 1) as in the authors' code, which is an order of heads; the norm has
    no weight (the authors' code has one per channel, which o_proj can hold); any position (with alibi the heads of a
    pair share a slope: every second one of N heads), a sliding window, both directions, norms on queries and keys,
    value residual.

    State and FLOPs: `graft.token_mixers.heads.MultiHead`'s; see `flops_per_token`.

    Args:
        config: what is computed.
        site: the surroundings.
    """

    param_roles: Mapping[str, Role] = dict.fromkeys(("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"), "scalar")

    def __init__(self, config: DifferentialConfig, site: Site):
        super().__init__(config, site)
        self.scale = self.head_dim**-0.5
        self.lambda_std, self.head_norm_eps = config.lambda_std, config.head_norm_eps
        self.lambda_init = initial_lambda(site.layer_idx)
        for name in self.param_roles:
            self.register_parameter(name, nn.Parameter(torch.empty(self.head_dim)))

    def init_parameters(self, rng: Rng) -> None:
        """The four vectors: normal, with the configured standard deviation."""
        for name in self.param_roles:
            normal_(self.get_parameter(name), self.lambda_std, rng(name))

    def lambda_now(self) -> Tensor:
        """λ, a scalar in fp32 at least."""
        wide = torch.promote_types(self.get_parameter("lambda_q1").dtype, torch.float32)
        q1, k1, q2, k2 = (self.get_parameter(name).to(wide) for name in self.param_roles)
        return torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + self.lambda_init

    def attend(self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visibility: Visibility) -> Tensor:
        """The difference of two attentions, normed; see `MultiHead.attend`."""
        slopes_N, rates_H = self.distance_terms(q_BTNH.device)
        scoring = Scoring(self.scale, None, None if slopes_N is None else slopes_N[1::2], rates_H)
        v_BSKH = torch.cat(v_BSKH.chunk(2, dim=2), dim=-1)  # K/2 heads of 2·H channels
        first_BTNH, second_BTNH = (
            attention(q, k, v_BSKH, visibility, scoring, kernels=self.kernels)
            for q, k in zip(q_BTNH.chunk(2, dim=2), k_BSKH.chunk(2, dim=2), strict=True)
        )
        return self._normed(first_BTNH, second_BTNH).unflatten(-1, (2, -1)).flatten(2, 3)

    def _normed(self, first_BTNH: Tensor, second_BTNH: Tensor) -> Tensor:
        """[B, T, N/2, 2·H]: the difference, its norm, and the constant that keeps gradients those of attention."""
        wide = torch.promote_types(first_BTNH.dtype, torch.float32)
        o_BTNH = first_BTNH.to(wide) - self.lambda_now().to(wide) * second_BTNH.to(wide)
        o_BTNH = F.rms_norm(o_BTNH, o_BTNH.shape[-1:], None, self.head_norm_eps)
        return ((1 - self.lambda_init) * o_BTNH).to(first_BTNH.dtype)

    def flops_per_token(self, seq_len: int) -> float:
        """2 per weight of the projections, and 6·N·H per visible pair: scores of N heads, and values twice as wide."""
        plain = super().flops_per_token(seq_len)  # 4·N·H per pair
        pairs = visible_pairs(seq_len, self.sliding_window, causal=self.causal)
        return plain + 2 * self.num_heads * self.head_dim * pairs / seq_len
