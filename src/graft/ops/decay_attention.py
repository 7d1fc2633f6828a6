"""Attention without softmax whose past fades by a factor per head and position, in time linear in the length.

``S_t = exp(log_decay_t) S_{t-1} + k_t v_tᵀ`` and ``y_t = S_tᵀ q_t``: retention (arXiv 2307.08621, a constant decay per
head) and the state space duality (2405.21060, a decay that depends on the token) are both this recurrence. The chunked
form is the latter's section 6: within a chunk all pairs, between chunks the state. Deviations: none.

Letters of this module: K groups of heads that share q and k, N = K·G heads, H channels of q and k, F channels of v,
X chunks of C positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.bidirectional import bidirectional_sum, own_values
from graft.ops.decay_attention_reference import recurrent_decay_attention
from graft.ops.documents import Documents, padded_documents
from graft.ops.kernels import Kernels


def decay_attention(
    q_BTKH: Tensor,
    k_BTKH: Tensor,
    v_BTNF: Tensor,
    log_decay_BTN: Tensor,
    *,
    documents: Documents | None = None,
    state_BNHF: Tensor | None = None,
    chunk_size: int = 64,
    kernels: Kernels = "auto",
) -> tuple[Tensor, Tensor]:
    """The outputs of all positions, and the state after the last.

    Args:
        q_BTKH: queries; head n reads group n // G.
        k_BTKH: keys, alike.
        v_BTNF: values, in the same dtype.
        log_decay_BTN: logarithms of the factors, at most 0; its B and T may be 1 where it does not vary.
        documents: borders and padding; None = one document, which goes on from the state, and no padding.
        state_BNHF: the state before the first position; None = zero.
        chunk_size: positions per chunk; changes the cost alone.
        kernels: ``reference`` forces the plain recurrence.

    Returns:
        [B, T, N, F] in the dtype of v (at padding: finite, otherwise without meaning), and the state [B, N, H, F] in
        fp32 or wider. Decays are computed in fp32 or wider, products of matrices in the dtype of v.
    """
    if kernels == "reference" or v_BTNF.shape[1] == 1:  # one step is cheapest as the recurrence
        return recurrent_decay_attention(
            q_BTKH, k_BTKH, v_BTNF, log_decay_BTN, documents=documents, state_BNHF=state_BNHF
        )
    return chunked_decay_attention(
        q_BTKH, k_BTKH, v_BTNF, log_decay_BTN, documents=documents, state_BNHF=state_BNHF, chunk_size=chunk_size
    )


def bidirectional_decay_attention(
    q_BTKH: Tensor,
    k_BTKH: Tensor,
    v_BTNF: Tensor,
    log_decay_BTN: Tensor,
    *,
    segment_ids_BT: Tensor | None = None,
    chunk_size: int = 64,
    kernels: Kernels = "auto",
) -> Tensor:
    """`decay_attention` in both directions (`bidirectional_sum`), each position's own term counted once: [B, T, N, F].

    With a constant factor γ a position sees another γ^|n − m| faded, on either side.
    """

    def one_way(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, documents: Documents | None) -> Tensor:
        return decay_attention(q, k, v, log_decay, documents=documents, chunk_size=chunk_size, kernels=kernels)[0]

    y_BTNF = bidirectional_sum(one_way, (q_BTKH, k_BTKH, v_BTNF, log_decay_BTN), segment_ids_BT)
    return (y_BTNF - own_values(q_BTKH, k_BTKH, v_BTNF)).to(v_BTNF.dtype)


class _Decays(NamedTuple):
    """What fades how much in each chunk. Leading axes may be 1 where nothing varies along them.

    Args:
        within_BXNCC: from a key (last axis) to a query of the same chunk; 0 for pairs that do not meet.
        from_start_BXNC: from the chunk's start to a query.
        to_end_BXNC: from a key to the chunk's end.
        across_BXN: over the whole chunk.
    """

    within_BXNCC: Tensor
    from_start_BXNC: Tensor
    to_end_BXNC: Tensor
    across_BXN: Tensor


def chunked_decay_attention(
    q_BTKH: Tensor,
    k_BTKH: Tensor,
    v_BTNF: Tensor,
    log_decay_BTN: Tensor,
    *,
    documents: Documents | None = None,
    state_BNHF: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The fast form of `decay_attention`: all matrix products batched over chunks, one short loop over their states."""
    _, T, N, width = v_BTNF.shape
    K, size, dtype = q_BTKH.shape[2], min(chunk_size, T), v_BTNF.dtype
    wide = torch.promote_types(dtype, torch.float32)
    extra = -T % size
    if documents is not None:
        k_BTKH = k_BTKH.masked_fill(~documents.real_BT[..., None, None], 0.0)
        documents = padded_documents(documents, extra) if extra else documents
    decays = _decays(log_decay_BTN.to(wide), T, size, documents)
    q_BXKCH, k_BXKCH, v_BXNCF = (_chunks(x, size, extra) for x in (q_BTKH, k_BTKH, v_BTNF))

    scores_BXKCC = q_BXKCH @ k_BXKCH.mT
    weights = scores_BXKCC[:, :, :, None] * decays.within_BXNCC.unflatten(2, (K, -1))  # [B, X, K, G, C, C]
    weights_BXNCC = weights.flatten(2, 3).to(dtype)
    across = _per_group(decays.across_BXN, K, width)
    if K == N:  # fading is worked into keys and queries, and one product adds what was before the chunk
        added = (k_BXKCH * decays.to_end_BXNC[..., None]).to(dtype).mT @ v_BXNCF
        entering, last = _scan(added, across, _grouped_state(state_BNHF, K, added))
        faded_BXNCH = (q_BXKCH * decays.from_start_BXNC[..., None]).to(dtype)
        y_BXNCF = _sum_of_products(weights_BXNCC, v_BXNCF, faded_BXNCH, entering.to(dtype))
    else:
        kept_BXNCF = (v_BXNCF * decays.to_end_BXNC[..., None]).to(dtype)
        added = k_BXKCH.mT @ _heads_last(kept_BXNCF, K)  # [B, X, K, H, G·F]
        entering, last = _scan(added, across, _grouped_state(state_BNHF, K, added))
        read = _heads_apart(q_BXKCH @ entering.to(dtype), width)
        y_BXNCF = weights_BXNCC @ v_BXNCF + read * decays.from_start_BXNC[..., None]

    y_BTNF = y_BXNCF.to(dtype).transpose(2, 3).flatten(1, 2)[:, :T]
    return y_BTNF, last.unflatten(-1, (N // K, width)).transpose(2, 3).flatten(1, 2)


def _sum_of_products(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """``a @ b + c @ d`` over leading axes alike, added while multiplying."""
    first = torch.bmm(a.flatten(0, -3), b.flatten(0, -3))
    return torch.baddbmm(first, c.flatten(0, -3), d.flatten(0, -3)).unflatten(0, a.shape[:-2])


def _chunks(x_BTNH: Tensor, size: int, extra: int) -> Tensor:
    """[B, T, N, H] to [B, X, N, C, H], filled up with zeros."""
    if extra:
        x_BTNH = F.pad(x_BTNH, (0, 0, 0, 0, 0, extra))
    return x_BTNH.unflatten(1, (-1, size)).transpose(2, 3).contiguous()  # copied once, not by every product


def _heads_last(x_BXNCF: Tensor, num_groups: int) -> Tensor:
    """[B, X, K·G, C, F] to [B, X, K, C, G·F]: the heads of a group side by side, for one product with their keys."""
    return x_BXNCF.unflatten(2, (num_groups, -1)).transpose(3, 4).flatten(4, 5)


def _heads_apart(x: Tensor, width: int) -> Tensor:
    """The inverse of `_heads_last`: [B, X, K, C, G·F] to [B, X, K·G, C, F]."""
    return x.unflatten(-1, (-1, width)).transpose(3, 4).flatten(2, 3)


def _per_group(across_BXN: Tensor, num_groups: int, width: int) -> Tensor:
    """[B, X, N] to [B, X, K, 1, G·F]: a factor per channel of `_heads_last`."""
    return across_BXN.unflatten(2, (num_groups, -1)).repeat_interleave(width, dim=-1)[:, :, :, None]


def _grouped_state(state_BNHF: Tensor | None, num_groups: int, like: Tensor) -> Tensor:
    """The state before the first chunk as [B, K, H, G·F] in fp32 or wider."""
    wide = torch.promote_types(like.dtype, torch.float32)
    if state_BNHF is None:
        return like.new_zeros(like[:, 0].shape, dtype=wide)
    return state_BNHF.to(wide).unflatten(1, (num_groups, -1)).transpose(2, 3).flatten(3, 4)


def _scan(added: Tensor, across: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states that enter each chunk [B, X, K, H, G·F], and the one after the last."""
    entering: list[Tensor] = []
    # unbind, for the gradient of an index is as large as what it is taken from
    for new, factor in zip(added.unbind(1), across.expand(-1, added.shape[1], -1, -1, -1).unbind(1), strict=True):
        entering.append(state)
        state = torch.addcmul(new.to(state.dtype), factor, state)
    return torch.stack(entering, dim=1), state


def _decays(log_decay_BTN: Tensor, num_positions: int, size: int, documents: Documents | None) -> _Decays:
    """The factors of every chunk. Padding fades nothing, nothing passes from one document to the next."""
    extra = -num_positions % size
    if documents is not None or extra:
        log_decay_BTN = F.pad(log_decay_BTN.expand(-1, num_positions, -1), (0, 0, 0, extra))
        if documents is not None:
            log_decay_BTN = log_decay_BTN.masked_fill(~documents.real_BT[..., None], 0.0)
    elif log_decay_BTN.shape[1] == 1:
        log_decay_BTN = log_decay_BTN.expand(-1, size, -1)  # every chunk is alike
    sums_BXNC = log_decay_BTN.unflatten(1, (-1, size)).mT.cumsum(-1)
    total_BXN1 = sums_BXNC[..., -1:]
    seen_BXCC = torch.ones(size, size, dtype=torch.bool, device=sums_BXNC.device).tril()[None, None]
    from_start_BXNC, to_end_BXNC, across_BXN = sums_BXNC, total_BXN1 - sums_BXNC, total_BXN1[..., 0]
    if documents is not None:
        run_BXC = documents.run_BT.unflatten(1, (-1, size))
        seen_BXCC = seen_BXCC & (run_BXC[..., :, None] == run_BXC[..., None, :])
        end_BX1 = run_BXC[..., -1:]
        start_BX1 = F.pad(end_BX1[:, :-1], (0, 0, 1, 0))  # the document under way when the chunk begins
        from_start_BXNC = _unless(run_BXC != start_BX1, from_start_BXNC)
        to_end_BXNC = _unless(run_BXC != end_BX1, to_end_BXNC)
        across_BXN = across_BXN.masked_fill(end_BX1 != start_BX1, -torch.inf)
    differences_BXNCC = sums_BXNC[..., :, None] - sums_BXNC[..., None, :]
    return _Decays(
        _unless(~seen_BXCC, differences_BXNCC).exp(), from_start_BXNC.exp(), to_end_BXNC.exp(), across_BXN.exp()
    )


def _unless(hidden: Tensor, logarithms: Tensor) -> Tensor:
    """Logarithms [B, X, N, …], −∞ for all heads where ``hidden`` [B, X, …]."""
    return logarithms.masked_fill(hidden[:, :, None], -torch.inf)


def chunked_flops(seq_len: int, *, num_groups: int, num_heads: int, head_dim: int, value_dim: int, size: int) -> float:
    """FLOPs per position of the chunked form's matrix products, with ``seq_len`` filled up to whole chunks.

    Counts what is multiplied: all pairs of a chunk, the masked ones included.
    """
    size = min(size, seq_len)
    filled = seq_len + -seq_len % size
    pairs = 2 * size * (num_groups * head_dim + num_heads * value_dim)  # scores, and values
    states = 4 * num_heads * head_dim * value_dim  # adding to the state, and reading it
    return (pairs + states) * filled / seq_len
