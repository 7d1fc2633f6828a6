"""What keeps a router's choices spread and its logits small, as sums over positions."""

from __future__ import annotations

import torch
from torch import Tensor


def balance_sum(probabilities_BTE: Tensor, experts: Tensor, real_BT: Tensor) -> Tensor:
    """Σ over rows of ``n · E · Σ_e f_e P_e``: the balance loss of Switch Transformer (2101.03961, equations 4 to 6).

    n is the row's number of positions, f_e the share of them that chose e (the shares add up to the number of choices)
    and P_e the mean probability of e. Divided by the number of positions it is 1 · choices when all experts are used
    alike, and more when those with more probability are chosen more often.

    Args:
        probabilities_BTE: adding up to one over the experts.
        experts: [B, T, k] the chosen ones.
        real_BT: false on padding, which counts for nothing.
    """
    weight_BT1 = real_BT[..., None].to(probabilities_BTE.dtype)
    chosen = weight_BT1.expand(experts.shape).flatten(1)
    num_chosen_BE = torch.zeros_like(probabilities_BTE[:, 0]).scatter_add(1, experts.flatten(1), chosen)
    mass_BE = (probabilities_BTE * weight_BT1).sum(1)
    positions_B = weight_BT1.sum((1, 2)).clamp(min=1)
    return probabilities_BTE.shape[-1] * ((num_chosen_BE * mass_BE).sum(-1) / positions_B).sum()


def variance_sum(probabilities_BTE: Tensor, real_BT: Tensor) -> Tensor:
    """Σ over rows of ``n · Var_e(P_e) / mean(P)²``, the squared coefficient of variation of the mean probabilities.

    n and P as in `balance_sum`; 0 when all experts are as probable, E - 1 when it is always one. Unlike the balance
    loss it does not see which were chosen.

    Args:
        probabilities_BTE: adding up to one over the experts.
        real_BT: false on padding, which counts for nothing.
    """
    weight_BT1 = real_BT[..., None].to(probabilities_BTE.dtype)
    mass_BE = (probabilities_BTE * weight_BT1).sum(1)
    positions_B = weight_BT1.sum((1, 2))
    squares_B = probabilities_BTE.shape[-1] * mass_BE.square().sum(-1) / positions_B.clamp(min=1)
    return (squares_B - positions_B).sum()


def z_sum(logits_BTE: Tensor, real_BT: Tensor) -> Tensor:
    """Σ over positions of ``logsumexp(logits)²`` (ST-MoE, 2202.08906, equation 5), without padding."""
    return (logits_BTE.logsumexp(-1).square() * real_BT).sum()
