"""Linear attention whose memory decays by a factor of its own in every channel of the keys.

``S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t`` (Gated Linear Attention, 2312.06635, section 4).

The chunked form halves: the pairs of a chunk are those of its first half, those of its second half, and those between
the halves, and the latter are one matrix product, since the decay from key to query is that from the key to the border
times that from the border to the query. Every exponent is a sum of logarithms that are at most 0, never a difference,
so that nothing overflows and strong decays lose nothing; a logarithm of −∞ forgets everything before its position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.autocast import full_precision
from graft.ops.kernels import Kernels
from graft.ops.outside_graphs import outside_graphs
from graft.shapes import Float

CHUNK = 64
"""Positions of a chunk: more cost more products within chunks, fewer more steps between them."""


def gated_linear_attention(
    q_BTNH: Float[Tensor, "B T N H"],
    k_BTNH: Float[Tensor, "B T N H"],
    v_BTNF: Float[Tensor, "B T N F"],
    log_decay_BTNH: Float[Tensor, "B T N H"],
    state_BNHF: Float[Tensor, "B N H F"] | None = None,
    *,
    kernels: Kernels = "auto",
) -> tuple[Float[Tensor, "B T N F"], Float[Tensor, "B N H F"]]:
    """The outputs of all positions, and the memory after the last.

    Args:
        q_BTNH: queries.
        k_BTNH: keys.
        v_BTNF: values.
        log_decay_BTNH: logarithms of the factors, from −∞ to 0.
        state_BNHF: the memory before the first position; None = zero.
        kernels: ``reference`` forces the recurrence.

    Returns:
        Outputs in the dtype of v, the memory in fp32 or wider. Both forms compute in fp32 or wider throughout.
    """
    # every level of halves would be several kernels of its own, and minutes to build
    return outside_graphs(_attend)(q_BTNH, k_BTNH, v_BTNF, log_decay_BTNH, state_BNHF, kernels)


def _attend(
    q_BTNH: Tensor,
    k_BTNH: Tensor,
    v_BTNF: Tensor,
    log_decay_BTNH: Tensor,
    state_BNHF: Tensor | None,
    kernels: Kernels,
) -> tuple[Tensor, Tensor]:
    """`gated_linear_attention`, outside of compiled graphs."""
    wide = torch.promote_types(v_BTNF.dtype, torch.float32)
    q_BNTH, k_BNTH, v_BNTF, log_decay_BNTH = (
        x.to(wide).transpose(1, 2) for x in (q_BTNH, k_BTNH, v_BTNF, log_decay_BTNH)
    )
    if state_BNHF is None:
        state_BNHF = q_BNTH.new_zeros((*q_BNTH.shape[:2], q_BNTH.shape[-1], v_BNTF.shape[-1]))
    form = _recurrent if kernels == "reference" else _chunked
    with full_precision(v_BTNF.device):
        o_BNTF, state_BNHF = form(q_BNTH, k_BNTH, v_BNTF, log_decay_BNTH, state_BNHF.to(wide))
    return o_BNTF.transpose(1, 2).to(v_BTNF.dtype), state_BNHF


def _recurrent(
    q_BNTH: Tensor, k_BNTH: Tensor, v_BNTF: Tensor, log_decay_BNTH: Tensor, state_BNHF: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written."""
    outputs: list[Tensor] = []
    for q, k, v, log_decay in zip(*(x.unbind(2) for x in (q_BNTH, k_BNTH, v_BNTF, log_decay_BNTH)), strict=True):
        state_BNHF = log_decay.exp()[..., None] * state_BNHF + k[..., None] * v[..., None, :]
        outputs.append((q[..., None] * state_BNHF).sum(-2))
    return torch.stack(outputs, dim=2), state_BNHF


def chunk_length(seq_len: int) -> int:
    """Positions of a chunk for a call of ``seq_len``: a power of two, no longer than needed."""
    return min(CHUNK, 1 << (seq_len - 1).bit_length())


def _chunked(
    q_BNTH: Tensor, k_BNTH: Tensor, v_BNTF: Tensor, log_decay_BNTH: Tensor, state_BNHF: Tensor
) -> tuple[Tensor, Tensor]:
    """Pairs within chunks, then what each chunk reads of those before it."""
    T = q_BNTH.shape[2]
    size = chunk_length(T)
    q, k, v, log_decay = (
        F.pad(x, (0, 0, 0, -T % size)).unflatten(2, (-1, size)) for x in (q_BNTH, k_BNTH, v_BNTF, log_decay_BNTH)
    )
    weights, sums = _within_chunks(q, k, log_decay)
    added = (k * sums.to_end.exp()).mT @ v  # [B, N, chunks, H, F]
    whole = sums.from_start[..., -1, :].exp()[..., None]
    entering: list[Tensor] = []
    for decay_BNH1, added_BNHF in zip(whole.unbind(2), added.unbind(2), strict=True):
        entering.append(state_BNHF)
        state_BNHF = decay_BNH1 * state_BNHF + added_BNHF
    across = (q * sums.from_start.exp()) @ torch.stack(entering, dim=2)
    return (weights @ v + across).flatten(2, 3)[:, :, :T], state_BNHF


class _Sums(NamedTuple):
    """Sums of logarithms of decays within blocks [B, N, blocks, P, H].

    Args:
        from_start: from the start of the block to each position, its own included.
        to_end: from each position to the end of the block, its own not included.
    """

    from_start: Tensor
    to_end: Tensor


def _within_chunks(q: Tensor, k: Tensor, log_decay: Tensor) -> tuple[Tensor, _Sums]:
    """Weights of the values of each chunk [B, N, chunks, C, C], and the sums over it; from blocks of 1, 2, 4, …"""
    size = q.shape[3]
    weights = (q * k).sum(-1)[..., None, None].flatten(2, 3)  # [B, N, blocks, P, P]
    sums = _Sums(log_decay, torch.zeros_like(log_decay))
    half = 1
    while half < size:
        weights, sums = _joined(q, k, weights, sums, half)
        half *= 2
    return weights, sums


def _joined(q: Tensor, k: Tensor, weights: Tensor, sums: _Sums, half: int) -> tuple[Tensor, _Sums]:
    """Blocks of ``half`` positions joined in pairs: the second of each pair sees the first."""

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.unflatten(3, (-1, 2, half)).flatten(2, 3).unbind(-3)
        return first, second

    def joined(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack((first, second), dim=-3).flatten(2, 4).unflatten(2, q.shape[2:4])

    (_, query), (key, _) = halves(q), halves(k)
    start, next_start = halves(sums.from_start)
    end, next_end = halves(sums.to_end)
    between = (query * next_start.exp()) @ (key * end.exp()).mT
    whole, next_whole = start[..., -1:, :], next_start[..., -1:, :]
    first, second = weights.unflatten(2, (-1, 2)).unbind(3)
    weights = torch.cat((F.pad(first, (0, half)), torch.cat((between, second), dim=-1)), dim=-2)
    return weights, _Sums(joined(start, next_start + whole), joined(end + next_whole, next_end))


def gated_linear_attention_flops(seq_len: int, *, num_heads: int, head_dim: int, value_dim: int) -> float:
    """FLOPs per position of the chunked form's matrix products, with ``seq_len`` filled up to whole chunks.

    Queries meet the earlier keys of their chunk alone (a position's pair with itself is no matrix product); the weights
    of values, half of them zero, are multiplied in full.
    """
    size = chunk_length(seq_len)
    filled = seq_len + -seq_len % size
    pairs = (size - 1) * head_dim + 2 * size * value_dim
    states = 4 * head_dim * value_dim  # adding to the memory, and reading it
    return num_heads * (pairs + states) * filled / seq_len
