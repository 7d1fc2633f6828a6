"""A bank of learned slots, read by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graft.config.roles import Role
from graft.initialization import Rng, normal_
from graft.linears.low_rank_config import LowRankConfig
from graft.memories.bank import Bank
from graft.memories.chapter_router import ChapterRouter, Choice
from graft.memories.memory_bank_config import MemoryBankConfig
from graft.memories.pooling import PoolState
from graft.ops.absorbed import absorb, absorbed_flops, expand
from graft.ops.attention import attention
from graft.ops.attention_mask import Scoring, Visibility
from graft.ops.chapter_attention import chapter_attention
from graft.ops.routing import count
from graft.part import Context, Part, PartOutput, Site, State, linear_flops
from graft.shapes import Float


class ScalarGate(nn.Module):
    """``tanh(g)``, g a learned number that starts at 0."""

    role: Role = "scalar"

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(()))

    def init_parameters(self, rng: Rng) -> None:
        nn.init.zeros_(self.value)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.value.tanh().to(x_BTD.dtype)


class SigmoidGate(nn.Module):
    """``σ(w·x + b)`` per position, in fp32 at least; b starts at 0.

    Args:
        width: channels of x.
        init_std: standard deviation of w at start.
    """

    role: Role = "scalar"

    def __init__(self, width: int, init_std: float):
        super().__init__()
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(()))

    def init_parameters(self, rng: Rng) -> None:
        normal_(self.weight, self.init_std, rng("weight"))
        nn.init.zeros_(self.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        scores_BT1 = (x_BTD.to(wide) * self.weight).sum(-1, keepdim=True) + self.bias
        return scores_BT1.sigmoid().to(x_BTD.dtype)


class MemoryBank(Part):
    """``y = g · W_o softmax(W_q x (W_k m)ᵀ / √H) W_v m`` over learned slots m, without positions and without a mask.

    Mixture of Chapters (Tasmay-Tibrewal/Memory, ICLR 2026 NFAM workshop), whose ancestors are persistent memory
    (1907.01470) and memory layers (2412.09764). With chapters each position reads a few of them, each with a softmax
    of its own: ``Σ_c p̂_c · attention(x, chapter c)``, p̂ from `graft.memories.chapter_router`, and beside them the
    shared ones with weight 1. One bank, one layer, no chapters is the static engram.

    Deviations: the original weighs the slots before keys and values are made of them, which fades the scores with the
    values; it routes with the mean of the whole sequence, later positions included, which we do only where it is asked
    for by name; prefix routing takes a fixed number of positions for the prompt. Shared and chosen outputs are added
    without norms between them. The balance loss is divided by the number of choices (alike = 1); all router losses are
    taken row by row, weighted by the row's positions, and added up over layers, so that micro-batches add up.

    Many queries are grouped by chapter (`graft.ops.chapter_attention`). Few of them, as in decoding, read the slots as
    they are: the maps to keys and values move over to queries and outputs (`graft.ops.absorbed`), where that takes
    fewer products. A bank may be shared between layers: the model owns it once.

    State: of token routing none; of the others a few columns of E scores (`graft.memories.pooling`). FLOPs: the maps
    of each position, 4·N·H per slot it reads, and the keys and values of the chapters read, made once per forward
    pass: counted for one document, shared by all of a micro-batch; or what the other order takes, if that is less.

    Args:
        config: what is computed.
        site: the surroundings.
    """

    bank: Bank

    def __init__(self, config: MemoryBankConfig, site: Site):
        super().__init__()
        self.config = self.settings = config
        D, reduced = site.hidden_size, config.low_rank_mode == "reduced_dim"
        self.width = D
        self.head_dim = config.head_dim or (config.bank_width(D) if reduced else D) // config.num_heads
        inner, read = config.num_heads * self.head_dim, config.kv_heads * self.head_dim
        width = config.bank_width(D) if reduced else config.memory_dim or D
        kind = None if config.projection_rank is None else LowRankConfig(rank=config.projection_rank)
        self.q_proj = site.make_linear(D, inner, role="memory_layer", config=kind)
        self.k_proj = site.make_linear(width, read, role="memory_layer", config=kind)
        self.v_proj = site.make_linear(width, read, role="memory_layer", config=kind)
        std = 0.0 if config.zero_init_output else None
        self.o_proj = site.make_linear(inner, D, role="memory_layer", residual_output=True, init_std=std, config=kind)
        self.router = None if config.num_chapters is None else ChapterRouter(config, site)
        gates = {"none": lambda: None, "scalar": ScalarGate, "sigmoid": lambda: SigmoidGate(D, site.init.std)}
        self.gate = gates[config.gate]()
        self._take_bank(site)

    def _take_bank(self, site: Site) -> None:
        """The layer's own bank, or one that belongs to the model (which this part reads and does not register)."""
        config = self.settings

        def make() -> Bank:
            return Bank(config, site.hidden_size)

        if config.sharing == "per_layer":
            self.bank = make()
            return
        every = config.sharing_k if config.sharing == "every_k" else None
        object.__setattr__(self, "bank", site.shared.take(config.bank, site.layer_idx, make, every=every))

    def forward(self, x_BTD: Float[Tensor, "B T D"], ctx: Context, state: PoolState | None = None) -> PartOutput:
        q_XNH = self.q_proj(x_BTD).unflatten(-1, (-1, self.head_dim)).flatten(0, 1)
        aux: dict[str, Tensor] = {}
        usage: dict[str, Tensor] = {}
        if self.router is None:
            o_XNH = self._read(q_XNH, None)
        else:
            decoding = state is not None
            choice, state = self.router(x_BTD, ctx.segment_ids_BT, state, kernels=self.kernels)
            o_XNH = self._read(q_XNH, choice)
            real_BT = ctx.real()
            if not decoding:
                aux = self.router.losses(choice, real_BT)
            if self.training:
                usage["chapters"] = count(choice.chapters_BTC, self.settings.routed_chapters, real_BT)
        y_BTD = self.o_proj(o_XNH.flatten(-2).unflatten(0, x_BTD.shape[:2]))
        return PartOutput(y_BTD if self.gate is None else y_BTD * self.gate(x_BTD), state, aux, {}, usage)

    def _dropout(self) -> float:
        return self.settings.attention_dropout if self.training else 0.0

    def _read(self, q_XNH: Tensor, choice: Choice | None) -> Tensor:
        """What X queries read of the bank: [X, N, H]."""
        rows = self.bank.rows()
        factors = self._factors()
        if factors is None or self.kernels == "reference" or not self._absorbs(q_XNH.shape[0]):
            return self._attend(q_XNH, rows, choice, project=True)
        keys, values = factors
        return expand(self._attend(absorb(q_XNH, keys), rows, choice, project=False), values)

    def _factors(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """What the keys and values of every head are the slots' products with, where they are."""
        keys, values = self.bank.factors(self.k_proj), self.bank.factors(self.v_proj)
        return None if keys is None or values is None else (self._for_each_head(keys), self._for_each_head(values))

    def _for_each_head(self, factors: list[Tensor]) -> list[Tensor]:
        """Factors to K heads as factors to N, which share them."""
        heads_each = self.settings.num_heads // self.settings.kv_heads
        if heads_each == 1:
            return factors
        last_RKH = factors[-1].unflatten(1, (-1, self.head_dim))
        return [*factors[:-1], last_RKH.repeat_interleave(heads_each, dim=1).flatten(1)]

    def _attend(self, q_XNH: Tensor, rows_MW: Tensor, choice: Choice | None, *, project: bool) -> Tensor:
        """Attention to the slots' keys and values, or (not ``project``) to the slots as they are, one for all heads."""
        scale, dropout = self.head_dim**-0.5, self._dropout()
        if choice is None:
            k_MKH, v_MKH = self._keys_values(rows_MW, project)
            one_row = (q_XNH[None], k_MKH[None], v_MKH[None], Visibility(causal=False), Scoring(scale))
            return attention(*one_row, dropout=dropout, kernels=self.kernels)[0]
        num_chapters = self.settings.num_chapters
        assert num_chapters is not None
        chapters_XC, weights_XC = self._chapters(choice)
        rows_EMW = rows_MW.unflatten(0, (num_chapters, -1))
        if project and chapters_XC.numel() < num_chapters and self.kernels != "reference":
            rows_EMW = rows_EMW.index_select(0, chapters_XC.flatten())  # the only ones that are worth projecting
            chapters_XC = torch.arange(chapters_XC.numel(), device=chapters_XC.device).view_as(chapters_XC)
        given = (q_XNH, *self._keys_values(rows_EMW, project), chapters_XC, weights_XC)
        return chapter_attention(*given, scale=scale, dropout=dropout, kernels=self.kernels)

    def _keys_values(self, rows: Tensor, project: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of rows [..., M, W]: [..., M, K, H] each."""
        if not project:
            return rows.unsqueeze(-2), rows.unsqueeze(-2)
        keys, values = self.bank.read(rows, self.k_proj), self.bank.read(rows, self.v_proj)
        return keys.unflatten(-1, (-1, self.head_dim)), values.unflatten(-1, (-1, self.head_dim))

    def _chapters(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """Numbers [X, C] of all chapters that are read, the shared ones first, and their weights."""
        shared = self.settings.num_shared_chapters
        chapters_XC, weights_XC = choice.chapters_BTC.flatten(0, 1) + shared, choice.weights_BTC.flatten(0, 1)
        if not shared:
            return chapters_XC, weights_XC
        always_XS = torch.arange(shared, device=chapters_XC.device).expand(chapters_XC.shape[0], -1)
        ones_XS = torch.ones_like(always_XS, dtype=weights_XC.dtype)
        return torch.cat((always_XS, chapters_XC), dim=1), torch.cat((ones_XS, weights_XC), dim=1)

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """The pooling's, whatever ``max_len``."""
        pooling = None if self.router is None else self.router.pooling
        if pooling is None:
            return None
        return pooling.empty_state(batch_size, self.settings.routed_chapters, device=device, dtype=dtype)

    def flops_per_token(self, seq_len: int) -> float:
        """The maps of each position, and what reading takes for one document, in the cheaper order."""
        each = linear_flops(self.q_proj) + linear_flops(self.o_proj)
        if self.router is not None:
            each += 2 * self.width * self.settings.routed_chapters
        return each + min(self._reading_flops(seq_len)) / seq_len

    def _absorbs(self, num_positions: int) -> bool:
        """Whether mapping queries and outputs takes less than mapping the slots."""
        projected, absorbed = self._reading_flops(num_positions)
        return absorbed < projected

    def _reading_flops(self, num_positions: int) -> tuple[float, float]:
        """FLOPs of `_read`: with keys and values made of the slots, and with slots read as they are."""
        slots, inner = self.settings.slots_read, self.settings.num_heads * self.head_dim
        made = min(self.settings.slots, num_positions * slots)
        read = self.settings.kv_heads * self.head_dim
        maps = sum(self.bank.flops(made, linear_flops(m), read) for m in (self.k_proj, self.v_proj))
        projected, factors = float(num_positions * 4 * inner * slots + maps), self._factors()
        if factors is None:
            return projected, float("inf")
        heads = self.settings.num_heads
        both = sum(absorbed_flops(chain, heads) for chain in factors)
        absorbed = num_positions * (both + 4 * heads * self.bank.width * slots)
        return projected, float(absorbed)

    def active_parameters(self) -> int:
        """All but the slots of its own bank that a position does not read (a shared bank is the model's)."""
        own = sum(p.numel() for p in self.parameters())
        return own - self._unread() if self.settings.sharing == "per_layer" else own

    def active_shared(self) -> Mapping[nn.Module, int]:
        """What a position reads of the bank, where that is the model's."""
        if self.settings.sharing == "per_layer":
            return {}
        return {self.bank: sum(p.numel() for p in self.bank.parameters()) - self._unread()}

    def _unread(self) -> int:
        """Parameters in the slots that a position does not read (a rounded bank has none)."""
        return 0 if self.bank.bits is not None else (self.settings.slots - self.settings.slots_read) * self.bank.width
