"""Networks for the tests of kernels, and stand-ins for the packages the kernels are from.

The stand-ins have the published signatures and compute position by position.

They know nothing of graft: rows are [B, T, …], packed documents are one row with borders (fla) or numbered (mamba-ssm).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from graft.config.model import ModelConfig

PARTS: dict[str, dict[str, Any]] = {
    "retention": {"type": "retention", "num_heads": 2, "head_dim": 16, "chunk_size": 5},
    "gla": {"type": "gla", "num_heads": 2, "head_dim": 16, "v_head_dim": 24},
    "gated_deltanet": {"type": "gated_deltanet", "num_k_heads": 2, "num_v_heads": 4, "head_dim": 16},
    "mamba2": {"type": "mamba2", "d_state": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 5},
    "attention": {
        "type": "attention",
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "sliding_window": 5,
        "logit_softcap": 5.0,
        "position": {"type": "alibi"},
    },
}
NAMES = {
    "retention": "fla",
    "gla": "fla",
    "gated_deltanet": "fla",
    "mamba2": "mamba_ssm",
    "attention": "flex",
}

DIRECTIONS = [*((tag, False) for tag in PARTS), *((tag, True) for tag in ("gla", "gated_deltanet", "attention"))]
"""Kinds of parts, in a decoder and (True) in an encoder, that have a kernel."""


def config(*tags: str) -> ModelConfig:
    blocks = {tag: [PARTS[tag], {"type": "mlp", "intermediate_size": 24}] for tag in tags}
    return ModelConfig.model_validate(
        {
            "hidden_size": 32,
            "num_layers": len(tags),
            "norm": {"type": "rms_norm"},
            "blocks": blocks,
            "layout": list(tags),
        }
    )


def packed(T: int) -> Tensor:
    """Two rows of documents with arbitrary numbers: padding on both sides and between, and a border at each place."""
    first = [0, 7, 7, 7, 0, 7, 3, 3, 3, 3, 9, 0]
    second = [2, 2, 2, 2, 2, 5, 5, 5, 1, 1, 1, 1]
    return torch.tensor([first, second])[:, :T]


CALLS: list[str] = []
"""Names of the stand-ins that were called, in order."""


def _by_document(one: Callable[..., Tensor], borders: Tensor | None, *tensors: Tensor) -> Tensor:
    if borders is None:
        return torch.stack([one(*(x[b] for x in tensors)) for b in range(len(tensors[0]))])
    assert borders.dtype == torch.int64
    assert len(tensors[0]) == 1, "packed documents are one row"
    ends = borders.tolist()
    assert ends[0] == 0
    assert ends[-1] == tensors[0].shape[1]
    pieces = [one(*(x[0, a:b] for x in tensors)) for a, b in itertools.pairwise(ends)]
    return torch.cat(pieces)[None]


def _linear(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """One sequence [T, N, …]; g per head and key channel."""
    S = q.new_zeros(*q.shape[1:], v.shape[-1])
    out = []
    for t in range(len(q)):
        S = g[t].exp()[..., None] * S + k[t][..., None] * v[t][:, None]
        out.append((q[t][..., None] * S).sum(-2))
    return torch.stack(out)


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, None]:
    CALLS.append("chunk_simple_gla")
    assert g is not None
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return _by_document(_linear, cu_seqlens, q * factor, k, v, g[..., None].expand_as(k)), None


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, None]:
    CALLS.append("chunk_gla")
    assert g.isfinite().all(), "sums of −∞ are no numbers"
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return _by_document(_linear, cu_seqlens, q * factor, k, v, g), None


def _delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    S = q.new_zeros(*q.shape[1:], v.shape[-1])
    out = []
    for t in range(len(q)):
        S = g[t].exp()[:, None, None] * S
        known = (k[t][..., None] * S).sum(-2)
        S = S + k[t][..., None] * (beta[t][:, None] * (v[t] - known))[:, None]
        out.append((q[t][..., None] * S).sum(-2))
    return torch.stack(out)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    CALLS.append("chunk_gated_delta_rule")
    assert g.isfinite().all(), "sums of −∞ are no numbers"
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return _by_document(_delta, cu_seqlens, q * factor, k, v, g, beta), None


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    CALLS.append("mamba_chunk_scan_combined")
    assert chunk_size >= 16
    assert chunk_size & (chunk_size - 1) == 0
    heads = x.shape[2] // B.shape[2]
    B, C = (y.repeat_interleave(heads, dim=2) for y in (B, C))
    rows = []
    for row in range(len(x)):
        S, out = x.new_zeros(x.shape[2], B.shape[-1], x.shape[-1]), []
        for t in range(x.shape[1]):
            if seq_idx is not None and t > 0 and seq_idx[row, t] != seq_idx[row, t - 1]:
                S = torch.zeros_like(S)
            step = dt[row, t]
            S = (step * A).exp()[:, None, None] * S + (step[:, None] * B[row, t])[..., None] * x[row, t][:, None]
            out.append((C[row, t][..., None] * S).sum(-2))
        rows.append(torch.stack(out))
    return torch.stack(rows)


MODULES: dict[str, dict[str, Any]] = {
    "fla": {},
    "fla.ops": {},
    "fla.ops.simple_gla": {"chunk_simple_gla": chunk_simple_gla},
    "fla.ops.gla": {"chunk_gla": chunk_gla},
    "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": chunk_gated_delta_rule},
    "mamba_ssm": {},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": mamba_chunk_scan_combined},
}


def install(patch: pytest.MonkeyPatch) -> None:
    """Makes the packages importable for a test."""
    CALLS.clear()
    for name, members in MODULES.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        for key, value in members.items():
            setattr(module, key, value)
        patch.setitem(sys.modules, name, module)
