"""The n-gram memory as a part."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.config.roles import Role
from graft.initialization import Rng, normal_
from graft.memories.canonical_ids import CanonicalIds
from graft.memories.ngram_config import NgramConfig
from graft.ops.ngram_hash import LARGEST, hashed_rows, primes_from, suffixes
from graft.ops.outside_graphs import outside_graphs
from graft.ops.row_gradients import wants_rows
from graft.ops.short_conv import ConvState
from graft.part import Context, Part, PartOutput, Site, linear_flops
from graft.shapes import Float, Int
from graft.token_mixers.short_conv import ShortConv


class NgramState(NamedTuple):
    """Where the n-grams stand.

    Args:
        ids_BJ: classes of the last ids, one fewer than the longest order, oldest first.
        segments_BJ: their document numbers; 0 = padding, or nothing yet.
        conv: of the convolution; None without one.
    """

    ids_BJ: Tensor
    segments_BJ: Tensor
    conv: ConvState | None


class NgramTables(nn.Module):
    """One table of rows per hash, stored as a single one, and the hashes' multipliers.

    Multipliers are odd, drawn at the start like parameters, and kept with the model; a hash of an order below the
    longest has zeros for the ids it leaves out.

    Args:
        config: orders, heads and sizes.
        vocab_size: ids that are hashed.
        init_std: standard deviation of the rows at the start.
    """

    role: Role = "expert_table"
    row_tables = ("weight",)
    multipliers: Tensor

    def __init__(self, config: NgramConfig, vocab_size: int, init_std: float):
        super().__init__()
        self.orders = [order for order in config.orders for _ in range(config.num_hash_heads)]
        self.sizes = primes_from(config.table_size, len(self.orders))
        self.largest, self.init_std = LARGEST // (vocab_size + 1), init_std
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), config.row_dim))
        self.register_buffer("multipliers", torch.empty(len(self.orders), max(config.orders), dtype=torch.int64))

    def init_parameters(self, rng: Rng) -> None:
        normal_(self.weight, self.init_std, rng("weight"))
        if self.multipliers.is_meta:
            return
        drawn = torch.randint(self.largest // 2, self.multipliers.shape, generator=rng("multipliers")) * 2 + 1
        for row, order in zip(drawn, self.orders, strict=True):
            row[order:] = 0
        self.multipliers.copy_(drawn)

    def forward(self, suffixes_BTN: Int[Tensor, "B T N"]) -> Float[Tensor, "B T W"]:
        """The rows of all hashes side by side."""
        sizes_R = torch.tensor(self.sizes, device=suffixes_BTN.device)
        rows_BTR = hashed_rows(suffixes_BTN, self.multipliers, sizes_R) + (sizes_R.cumsum(0) - sizes_R)
        if wants_rows(self.weight):  # compiled graphs know no gradients of single rows
            return outside_graphs(F.embedding)(rows_BTR, self.weight, sparse=True).flatten(-2)
        return F.embedding(rows_BTR, self.weight).flatten(-2)


class Ngram(Part):
    """Engram (Conditional Memory via Scalable Lookup, DeepSeek-AI, 2601.07372, section 2): n-grams looked up in tables.

    The last 2 and 3 tokens (`orders`) of position t are hashed, each in several ways, to rows of tables; the rows side
    by side are e. With h the stream: ``α = σ(n(h) · n(W_K e) / √D)``, ``v = α W_V e``, and the memory adds
    ``silu(conv(n(v))) + v``, the convolution depthwise and causal, its taps as far apart as the longest n-gram. It
    starts at zero, so that at first the memory adds v alone. Hashes are sums by XOR of ids times odd numbers, modulo a
    prime of its own for each table. Ids are first mapped to classes of equal texts (`graft.memories.canonical_ids`).

    Deviations: one residual stream (the paper's network has several, with a key map each); every hash has multipliers
    of its own, not only a prime; accents are not stripped from texts; before a document's first token an n-gram is cut
    short, instead of filled with a padding token. In an encoder n-grams still look back only; the convolution is
    centred.

    The tables have the role ``expert_table``: no weight decay, Adam rather than Muon, and with
    ``optimizer.groups.expert_table`` a rate of their own (the paper: five times the others').

    State: the last ids (one fewer than the longest order) and (conv_size − 1) · longest order vectors of D, with a
    document number each. FLOPs: the two maps of e; lookups, gate and convolution are no matrix products.

    Args:
        config: what is computed.
        site: the surroundings.
    """

    canonical: CanonicalIds | None

    def __init__(self, config: NgramConfig, site: Site):
        super().__init__()
        assert site.vocab_size is not None, "a memory of n-grams must know how many ids there are"
        self.config, self.span = config, max(config.orders)
        D, width = site.hidden_size, len(config.orders) * config.num_hash_heads * config.row_dim
        vocab_size = site.vocab_size
        self.tables = NgramTables(config, vocab_size, site.init.std)
        value_std = 0.0 if config.zero_init_output else None
        self.k_proj = site.make_linear(width, D, role="memory_layer")
        self.v_proj = site.make_linear(width, D, role="memory_layer", residual_output=True, init_std=value_std)
        self.stream_norm = site.make_norm(D, config.gate_norm)
        self.k_norm = site.make_norm(D, config.gate_norm)
        self.conv_norm = self.conv = None
        if config.conv_size is not None:
            self.conv_norm = site.make_norm(D, config.gate_norm)
            self.conv = ShortConv(D, config.conv_size, causal=site.causal, dilation=self.span, zero_init=True)
        shared = None
        if config.canonicalize:  # one for all layers: the model owns it
            shared = site.shared.take("canonical_ids", site.layer_idx, lambda: CanonicalIds(vocab_size))
        object.__setattr__(self, "canonical", shared)

    def forward(self, x_BTD: Float[Tensor, "B T D"], ctx: Context, state: NgramState | None = None) -> PartOutput:
        suffixes_BTN, ids_BJ, segments_BJ = self._suffixes(ctx, state)
        read_BTW = self.tables(suffixes_BTN).to(x_BTD.dtype)
        v_BTD = self._gate(x_BTD, self.k_proj(read_BTW)).to(x_BTD.dtype) * self.v_proj(read_BTW)
        conv = None if state is None else state.conv
        if self.conv is not None and self.conv_norm is not None:
            y_BTD, conv = self.conv(self.conv_norm(v_BTD), ctx.segment_ids_BT, conv, kernels=self.kernels)
            v_BTD = F.silu(y_BTD) + v_BTD
        if state is None:
            return PartOutput(v_BTD)
        assert ids_BJ is not None
        assert segments_BJ is not None
        return PartOutput(v_BTD, NgramState(ids_BJ, segments_BJ, conv))

    def _gate(self, x_BTD: Tensor, k_BTD: Tensor) -> Tensor:
        """α [B, T, 1] in fp32 or wider."""
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        q_BTD, k_BTD = self.stream_norm(x_BTD).to(wide), self.k_norm(k_BTD).to(wide)
        return torch.sigmoid((q_BTD * k_BTD).sum(-1, keepdim=True) / q_BTD.shape[-1] ** 0.5)

    def _suffixes(self, ctx: Context, state: NgramState | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The last ids of each position, and those to remember with their document numbers."""
        ids_BT = ctx.token_ids_BT if self.canonical is None else self.canonical(ctx.token_ids_BT)
        if state is None:
            return suffixes(ids_BT, ctx.segment_ids_BT, self.span, kernels=self.kernels), None, None
        segments_BT = ctx.segment_ids_BT
        if segments_BT is None:
            segments_BT = torch.ones_like(ids_BT)
        ids_BS = torch.cat((state.ids_BJ, ids_BT), dim=1)
        segments_BS = torch.cat((state.segments_BJ, segments_BT.to(torch.int64)), dim=1)
        T, length = ids_BT.shape[1], state.ids_BJ.shape[1]
        found_BSN = suffixes(ids_BS, segments_BS, self.span, kernels=self.kernels)
        return found_BSN[:, length:], ids_BS[:, T:], segments_BS[:, T:]

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device, dtype: torch.dtype) -> NgramState:
        """Nothing seen yet, whatever ``max_len``."""
        options: dict[str, Any] = {"dtype": torch.int64, "device": device}
        ids_BJ, segments_BJ = (torch.zeros(batch_size, self.span - 1, **options) for _ in range(2))
        conv = None if self.conv is None else self.conv.empty_state(batch_size, device=device, dtype=dtype)
        return NgramState(ids_BJ, segments_BJ, conv)

    def flops_per_token(self, seq_len: int) -> float:
        """2 per weight of the two maps."""
        return float(linear_flops(self))

    def active_parameters(self) -> int:
        """All but the rows that a position does not read."""
        table = self.tables.weight
        read = len(self.tables.sizes) * table.shape[1]
        return sum(p.numel() for p in self.parameters()) - table.numel() + read
