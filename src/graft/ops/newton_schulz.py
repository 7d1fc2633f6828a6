"""Nearly orthogonal matrices by Newton–Schulz iteration: what turns a momentum matrix into Muon's update.

Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks"
(kellerjordan.github.io/posts/muon). With X₀ = G / ‖G‖_F, each step is ``A = XXᵀ; X ← aX + (bA + cA²)X``: every singular
value s of X becomes ``as + bs³ + cs⁵``, which pushes all of (0, 1] into a band around 1 within five steps.
Deviations: the norm is taken in the input's precision (fp32 for fp32 gradients), before rounding to ``dtype``, and of
entries scaled to at most 1, so that neither tiny nor huge gradients under- or overflow; a zero matrix gives zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315
"""The quintic's coefficients: the steepest slope at 0 that still keeps (0, 1] in the band."""


def _normalised(g_XRC: Tensor) -> Tensor:
    """``g`` divided by the Frobenius norm of each matrix, laid with its shorter side first (fewer FLOPs)."""
    tiny = torch.finfo(g_XRC.dtype).tiny  # keeps a zero matrix zero
    x_XRC = g_XRC / g_XRC.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    x_XRC = x_XRC / torch.linalg.vector_norm(x_XRC, dim=(-2, -1), keepdim=True).clamp_min(tiny)
    return x_XRC.mT if g_XRC.shape[-2] > g_XRC.shape[-1] else x_XRC


def newton_schulz_reference(g_XRC: Tensor, *, steps: int) -> Tensor:
    """The plain form of `newton_schulz`, in the precision of its input.

    Shapes: ``[..., R, C] -> [..., R, C]``.
    """
    x_XRC = _normalised(g_XRC)
    for _ in range(steps):
        a_XRR = x_XRC @ x_XRC.mT
        x_XRC = A * x_XRC + (B * a_XRR + C * (a_XRR @ a_XRR)) @ x_XRC
    return x_XRC.mT if g_XRC.shape[-2] > g_XRC.shape[-1] else x_XRC


def newton_schulz(g_XRC: Tensor, *, steps: int, dtype: torch.dtype) -> Tensor:
    """Each matrix's nearest semi-orthogonal one, roughly: UVᵀ with singular values scattered around 1.

    Args:
        g_XRC: a matrix [R, C], or a batch of them [..., R, C].
        steps: iterations; five are enough for full rank.
        dtype: precision of the matrix products.

    Returns:
        [..., R, C] in ``dtype``. It costs ``steps · (4·r²·c + 2·r³)`` FLOPs per matrix, r being the shorter side and c
        the longer.
    """
    x_MRC = _normalised(g_XRC).to(dtype)
    short, long = x_MRC.shape[-2:]
    x_MRC = x_MRC.reshape(-1, short, long)
    single = x_MRC.shape[0] == 1
    x = x_MRC[0] if single else x_MRC  # one matrix multiplies faster without a batch axis
    product = torch.addmm if single else torch.baddbmm
    for _ in range(steps):
        a = x @ x.mT
        x = product(x, product(a, a, a, beta=B, alpha=C), x, beta=A)
    x_XRC = x.reshape(*g_XRC.shape[:-2], short, long)
    return x_XRC.mT if g_XRC.shape[-2] > g_XRC.shape[-1] else x_XRC
