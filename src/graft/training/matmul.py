"""The route of fp32 matrix products on a CPU: faster where that is measured and still fp32."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, int, int]
"""Rows, inner size and columns of a matrix product."""

PROBE_SHAPE: Shape = (512, 512, 2048)
"""Largest product that is measured, by its number of multiply-adds."""

SMALLEST_PROBED = 2**23
"""Multiply-adds below which nothing is measured and the default stays: there is little to gain, noise would choose."""

MAX_PROBE_ERROR = 2e-6
"""Largest error, as a share of the largest entry, at which a product still counts as fp32. Rounding its inputs to bf16
costs a thousand times more, fp32 sums in another order well below half."""

MIN_PROBE_SPEEDUP = 1.2
"""Gain from which oneDNN is used: noise alone must not turn the choice around between a run and its continuation."""


@dataclass(frozen=True)
class MatmulProbe:
    """What was measured before choosing the route of fp32 matrix products.

    Args:
        shape: rows, inner size, columns of the products (y = xw, and its two gradients).
        default_seconds: best time of the three products on PyTorch's default route.
        onednn_seconds: the same on oneDNN's.
        onednn_error: largest error of oneDNN's products against fp64, over the largest entry.
    """

    shape: Shape
    default_seconds: float
    onednn_seconds: float
    onednn_error: float

    @property
    def speedup(self) -> float:
        """How many times faster oneDNN was."""
        return self.default_seconds / self.onednn_seconds

    @property
    def accepts_onednn(self) -> bool:
        """Faster, and still fp32."""
        return self.speedup >= MIN_PROBE_SPEEDUP and self.onednn_error < MAX_PROBE_ERROR


def use_onednn_fp32(enabled: bool) -> None:
    """Sends fp32 matrix products on the CPU to oneDNN, or to PyTorch's default library.

    The only switch that does so also *permits* oneDNN to round to bf16. Whether it really does depends on the
    processor, hence `probe_fp32_matmul`.
    """
    torch.set_float32_matmul_precision("medium" if enabled else "highest")


def product_seconds(left: Tensor, right: Tensor) -> float:
    """Wall time of one ``left @ right``."""
    start = time.perf_counter()
    left @ right
    return time.perf_counter() - start


def _products(shape: Shape) -> tuple[tuple[Tensor, Tensor], ...]:
    """Factors of a linear map's three products: y = xw, dx = dy wᵀ, dw = xᵀ dy."""
    M, K, N = shape
    generator = torch.Generator().manual_seed(0)
    x_MK, w_KN, dy_MN = (torch.randn(s, generator=generator) for s in ((M, K), (K, N), (M, N)))
    return (x_MK, w_KN), (dy_MN, w_KN.T), (x_MK.T, dy_MN)


def relative_error(product: Tensor, left: Tensor, right: Tensor) -> float:
    """Largest error of ``product`` against ``left @ right`` in fp64, over the largest entry, in the first rows.

    Each entry has all its terms, so some rows tell as much as all, and fp64 is slow.
    """
    exact = left[:64].double() @ right.double()
    return float((product[:64] - exact).abs().max() / exact.abs().max())


@torch.no_grad()
def probe_fp32_matmul(shape: Shape = PROBE_SHAPE, *, rounds: int = 5) -> MatmulProbe:
    """Times a linear map's three products on both routes, in turn, and measures oneDNN's error against fp64.

    The route that was set before is set again at the end.

    Args:
        shape: rows, inner size, columns. Rows beyond the multiply-adds of `PROBE_SHAPE` are left out.
        rounds: timed repetitions; the best time of each product counts, since noise only ever adds.
    """
    K, N = (min(size, 4096) for size in shape[1:])
    M = max(64, min(shape[0], PROBE_SHAPE[0] * PROBE_SHAPE[1] * PROBE_SHAPE[2] // (K * N)))
    products = _products((M, K, N))
    best = {onednn: [float("inf")] * len(products) for onednn in (False, True)}
    before = torch.get_float32_matmul_precision()
    try:
        use_onednn_fp32(True)
        error = max(relative_error(left @ right, left, right) for left, right in products)
        for round_idx in range(1 + rounds):
            for onednn, times in best.items():
                use_onednn_fp32(onednn)
                for i, (left, right) in enumerate(products):
                    seconds = product_seconds(left, right)
                    if round_idx > 0:  # the first round warms up
                        times[i] = min(times[i], seconds)
    finally:
        torch.set_float32_matmul_precision(before)
    return MatmulProbe((M, K, N), sum(best[False]), sum(best[True]), error)
