"""The gated sum ``h_t = decay_t ⊙ h_{t-1} + x_t``, channel by channel, in a few steps for any length."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.kernels import Kernels
from graft.shapes import Float

CHUNK = 16
"""Positions of a chunk: a scan makes this many steps on each level, and has log(T) / log(CHUNK) levels."""


def linear_scan(
    decay_BTD: Float[Tensor, "B T D"],
    x_BTD: Float[Tensor, "B T D"],
    state_BD: Float[Tensor, "B D"] | None = None,
    *,
    kernels: Kernels = "auto",
) -> Float[Tensor, "B T D"]:
    """All ``h_t``; the last is the state after T positions.

    Both forms multiply and add, and never divide or take logarithms: any decays are safe, zeros (which forget
    everything) included. They agree to the rounding of a product of decays.

    Args:
        decay_BTD: factors, of size at most 1 for a sum that stays bounded.
        x_BTD: what is added, in the same dtype.
        state_BD: ``h`` before the first position, in the same dtype; None = zero.
        kernels: ``reference`` forces the recurrence, one position after the other.
    """
    if state_BD is None:
        state_BD = torch.zeros_like(x_BTD[:, 0])
    if kernels == "reference":
        return reference_scan(decay_BTD, x_BTD, state_BD)
    return _scan(decay_BTD, x_BTD, state_BD, False)


def reference_scan(decay_BTD: Tensor, x_BTD: Tensor, state_BD: Tensor) -> Tensor:
    """The recurrence as it is written."""
    h_BTD: list[Tensor] = []
    for decay_BD, x_BD in zip(decay_BTD.unbind(1), x_BTD.unbind(1), strict=True):
        state_BD = decay_BD * state_BD + x_BD
        h_BTD.append(state_BD)
    return torch.stack(h_BTD, dim=1)


@torch.library.custom_op("graft::linear_scan", mutates_args=())
def _scan(decay_BTD: Tensor, x_BTD: Tensor, state_BD: Tensor, backward: bool) -> Tensor:
    """The chunked scan, as one operation to autograd and to the compiler."""
    return chunked_scan(decay_BTD, x_BTD, state_BD, backward=backward).contiguous()


@_scan.register_fake
def _(decay_BTD: Tensor, x_BTD: Tensor, state_BD: Tensor, backward: bool) -> Tensor:  # noqa: ARG001 (the same arguments)
    return x_BTD.new_empty(x_BTD.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    """Keeps the result: with it, the gradient is the same scan going back, and nothing between is needed."""
    decay_BTD, _, state_BD, _ = inputs
    ctx.save_for_backward(decay_BTD, state_BD, output)


def _gradients(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    """Gradients of the decays, of what is added and of the state."""
    decay_BTD, state_BD, h_BTD = ctx.saved_tensors
    next_decay_BTD = F.pad(decay_BTD[:, 1:], (0, 0, 0, 1))
    grad_x_BTD = _scan(next_decay_BTD, grad_BTD, torch.zeros_like(state_BD), True)
    before_BTD = torch.cat((state_BD[:, None], h_BTD[:, :-1]), dim=1)
    return grad_x_BTD * before_BTD, grad_x_BTD, grad_x_BTD[:, 0] * decay_BTD[:, 0], None


_scan.register_autograd(_gradients, setup_context=_keep)


def chunked_scan(decay_BTD: Tensor, x_BTD: Tensor, state_BD: Tensor, *, backward: bool = False) -> Tensor:
    """The scan of every chunk as if it came first, then the same over the chunks, then each chunk's past added.

    Args:
        decay_BTD: factors.
        x_BTD: what is added.
        state_BD: ``h`` before the first position (zero when going back from an end that is filled up).
        backward: go from the last position to the first, ``h_t = decay_t ⊙ h_{t+1} + x_t``.
    """
    T = x_BTD.shape[1]
    if T <= CHUNK:
        return _rows(decay_BTD, x_BTD, state_BD, backward)[0]
    extra = -T % CHUNK
    decay_BXCD, x_BXCD = (F.pad(z, (0, 0, 0, extra)).unflatten(1, (-1, CHUNK)) for z in (decay_BTD, x_BTD))
    alone_BXCD, decayed_BXCD = _rows(decay_BXCD, x_BXCD, None, backward)
    end = 0 if backward else -1
    ends_BXD = chunked_scan(decayed_BXCD[:, :, end], alone_BXCD[:, :, end], state_BD, backward=backward)
    kept_BXD = torch.cat((ends_BXD[:, 1:], state_BD[:, None]) if backward else (state_BD[:, None], ends_BXD[:, :-1]), 1)
    return torch.addcmul(alone_BXCD, decayed_BXCD, kept_BXD[:, :, None]).flatten(1, 2)[:, :T]


def _rows(decay: Tensor, x: Tensor, state: Tensor | None, backward: bool) -> tuple[Tensor, Tensor]:
    """One step after the other along the last axis but one, for all other axes at once.

    Returns:
        The scan, and the products of the decays up to each step.
    """
    h, products = torch.empty_like(x), torch.empty_like(decay)
    steps = range(x.shape[-2])
    before: int | None = None
    for t in reversed(steps) if backward else steps:
        x_t, decay_t, h_t, product_t = (z[..., t, :] for z in (x, decay, h, products))
        if before is None:
            product_t.copy_(decay_t)
            h_t.copy_(x_t if state is None else torch.addcmul(x_t, decay_t, state))
        else:
            torch.mul(products[..., before, :], decay_t, out=product_t)
            torch.addcmul(x_t, decay_t, h[..., before, :], out=h_t)
        before = t
    return h, products
