"""Sigmoid attention as it is defined: one explicit mask, fp32 scores. The block-wise kernel must agree with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graft.ops.attention_mask import Scoring, Visibility
from graft.ops.attention_reference import reference_scores, weighted_values

NORMALIZER_EPS = 1e-6
"""Added to the sum of a query's weights before they are divided by it."""


@dataclass(frozen=True)
class Weighing:
    """How a score becomes a weight: ``σ(score + bias + bias_n)``, optionally divided by their sum over keys.

    Args:
        bias: added to every score; None = −log of the number of keys that the query sees.
        bias_N: [N] added to the scores of each head, with a gradient; None = nothing.
        normalize: weights are divided by (their sum + `NORMALIZER_EPS`).
    """

    bias: float | None = None
    bias_N: Tensor | None = None
    normalize: bool = False


def reference_sigmoid_attention(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visibility: Visibility, scoring: Scoring, weighing: Weighing
) -> Tensor:
    """Arguments as in `graft.ops.sigmoid_attention.sigmoid_attention`. Time and memory O(T·S) in fp32 (fp64 stays)."""
    scores_BNTS = reference_scores(q_BTNH, k_BSKH, visibility, scoring)
    seen = visibility.block(0, q_BTNH.shape[1], 0, k_BSKH.shape[1], q_BTNH.device)
    seen_BNTS = torch.ones_like(scores_BNTS, dtype=torch.bool) if seen is None else seen[:, None].expand_as(scores_BNTS)
    if weighing.bias is None:
        scores_BNTS = scores_BNTS - seen_BNTS.sum(-1, keepdim=True).clamp_min(1).to(scores_BNTS.dtype).log()
    else:
        scores_BNTS = scores_BNTS + weighing.bias
    if weighing.bias_N is not None:
        scores_BNTS = scores_BNTS + weighing.bias_N.to(scores_BNTS.dtype)[:, None, None]
    p_BNTS = torch.sigmoid(scores_BNTS).masked_fill(~seen_BNTS, 0.0)
    if weighing.normalize:
        p_BNTS = p_BNTS / (p_BNTS.sum(-1, keepdim=True) + NORMALIZER_EPS)
    return weighted_values(p_BNTS, v_BSKH).to(q_BTNH.dtype)
