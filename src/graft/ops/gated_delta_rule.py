"""Linear attention that corrects its memory: the gated delta rule.

``S_t = α_t (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ, o_t = S_tᵀ q_t`` with S [H, F]: what the memory says of a key is
replaced, to the share β, by its value, and everything fades by α (Gated Delta Networks, 2412.06464, equation 10, with
S transposed).

The chunked form (section 3.3 there, after 2406.06484) writes what a chunk adds as corrected values w: within a chunk of
entering memory S, ``w_i = β_i (v_i − γ_i Sᵀk_i − Σ_{j < i} (γ_i / γ_j)(k_i·k_j) w_j)`` with γ the product of α from the
chunk's start. That is one unit triangular system per chunk. Products of α are exponentials of sums of logarithms that
are at most 0, never of differences, so that a logarithm of −∞ forgets everything before its position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.ops.autocast import full_precision
from graft.ops.kernels import Kernels
from graft.shapes import Float

CHUNK = 64
"""Positions of a chunk: more cost larger systems, fewer more steps between them."""


def gated_delta_rule(
    q_BTNH: Float[Tensor, "B T N H"],
    k_BTNH: Float[Tensor, "B T N H"],
    v_BTNF: Float[Tensor, "B T N F"],
    log_decay_BTN: Float[Tensor, "B T N"],
    beta_BTN: Float[Tensor, "B T N"],
    state_BNHF: Float[Tensor, "B N H F"] | None = None,
    *,
    kernels: Kernels = "auto",
) -> tuple[Float[Tensor, "B T N F"], Float[Tensor, "B N H F"]]:
    """The outputs of all positions, and the memory after the last.

    Args:
        q_BTNH: queries.
        k_BTNH: keys, of length at most 1 for a memory that stays bounded.
        v_BTNF: values.
        log_decay_BTN: logarithms of α, from −∞ to 0.
        beta_BTN: shares that are replaced; 0 leaves the memory as it is.
        state_BNHF: the memory before the first position; None = zero.
        kernels: ``reference`` forces the recurrence.

    Returns:
        Outputs in the dtype of v, the memory in fp32 or wider. Both forms compute in fp32 or wider throughout.
    """
    wide = torch.promote_types(v_BTNF.dtype, torch.float32)
    q_BNTH, k_BNTH, v_BNTF = (x.to(wide).transpose(1, 2) for x in (q_BTNH, k_BTNH, v_BTNF))
    log_decay_BNT, beta_BNT = (x.to(wide).transpose(1, 2) for x in (log_decay_BTN, beta_BTN))
    if state_BNHF is None:
        state_BNHF = q_BNTH.new_zeros((*q_BNTH.shape[:2], q_BNTH.shape[-1], v_BTNF.shape[-1]))
    form = _recurrent if kernels == "reference" else _chunked
    with full_precision(v_BTNF.device):
        o_BNTF, state_BNHF = form(q_BNTH, k_BNTH, v_BNTF, log_decay_BNT, beta_BNT, state_BNHF.to(wide))
    return o_BNTF.transpose(1, 2).to(v_BTNF.dtype), state_BNHF


def _recurrent(
    q_BNTH: Tensor, k_BNTH: Tensor, v_BNTF: Tensor, log_decay_BNT: Tensor, beta_BNT: Tensor, state_BNHF: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written."""
    outputs: list[Tensor] = []
    tensors = (q_BNTH, k_BNTH, v_BNTF, log_decay_BNT[..., None], beta_BNT[..., None])
    for q, k, v, log_decay, beta in zip(*(x.unbind(2) for x in tensors), strict=True):
        state_BNHF = log_decay.exp()[..., None] * state_BNHF
        known = (k[..., None] * state_BNHF).sum(-2)
        state_BNHF = state_BNHF + k[..., None] * (beta * (v - known))[..., None, :]
        outputs.append((q[..., None] * state_BNHF).sum(-2))
    return torch.stack(outputs, dim=2), state_BNHF


def chunk_length(seq_len: int) -> int:
    """Positions of a chunk for a call of ``seq_len``: no more than needed."""
    return min(CHUNK, seq_len)


def _sums_between(log_decay: Tensor) -> Tensor:
    """[…, C] to […, C, C]: entry (i, j) is the sum over j < l <= i, −∞ for j > i. Adds alone, so that −∞ is allowed."""
    size = log_decay.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril()
    terms = log_decay[..., None].expand(*log_decay.shape, size).masked_fill(~lower.tril(-1), 0.0)
    return terms.cumsum(-2).masked_fill(~lower, -torch.inf)


def _chunked(
    q_BNTH: Tensor, k_BNTH: Tensor, v_BNTF: Tensor, log_decay_BNT: Tensor, beta_BNT: Tensor, state_BNHF: Tensor
) -> tuple[Tensor, Tensor]:
    """All that does not depend on the memory for all chunks at once, then the memory from chunk to chunk."""
    T, width = v_BNTF.shape[2:]
    size = chunk_length(T)
    q, k, v = (F.pad(x, (0, 0, 0, -T % size)).unflatten(2, (-1, size)) for x in (q_BNTH, k_BNTH, v_BNTF))
    log_decay, beta = (F.pad(x, (0, -T % size)).unflatten(2, (-1, size)) for x in (log_decay_BNT, beta_BNT))
    between = _sums_between(log_decay).exp()  # [B, N, chunks, C, C]
    from_start = log_decay.cumsum(-1).exp()[..., None]
    to_end = between[..., -1, :, None]

    system = beta[..., None] * (k @ k.mT) * between  # its diagonal counts as ones, what is above it is zero
    sides = beta[..., None] * torch.cat((v, from_start * k), dim=-1)
    corrected, read = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True).split(
        (width, k.shape[-1]), dim=-1
    )
    weights, asked, kept = (q @ k.mT) * between, q * from_start, (k * to_end).mT
    outputs: list[Tensor] = []
    # taken apart at once: the gradient of an indexed chunk would be a tensor over all positions, for each chunk
    chunks = (x.unbind(2) for x in (corrected, read, asked, weights, kept, from_start[..., -1:, :]))
    for v_corrected, k_read, q_asked, w, k_kept, decay in zip(*chunks, strict=True):
        added = v_corrected - k_read @ state_BNHF
        outputs.append(q_asked @ state_BNHF + w @ added)
        state_BNHF = decay * state_BNHF + k_kept @ added
    return torch.cat(outputs, dim=2)[:, :, :T], state_BNHF


def gated_delta_rule_flops(seq_len: int, *, num_heads: int, head_dim: int, value_dim: int) -> float:
    """FLOPs per position of the chunked form's matrix products, with ``seq_len`` filled up to whole chunks.

    Counts what is multiplied, masked pairs included; the triangular system as a product of half a square.
    """
    size = chunk_length(seq_len)
    filled = seq_len + -seq_len % size
    pairs = 2 * size * (2 * head_dim + value_dim)  # keys with keys, queries with keys, weights with values
    system = size * (head_dim + value_dim)
    states = 6 * head_dim * value_dim  # two readings of the memory, one addition to it
    return num_heads * (pairs + system + states) * filled / seq_len
