"""Config of the memory bank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from graft.config.base import SET, Config, Problem, knob
from graft.config.families import MemoryConfig

Routing = Literal["token", "rolling", "chunk", "prefix", "sequence"]
_CHAPTERS = {"num_chapters": SET}


class BankQuantizationConfig(Config):
    """Training with the slots rounded to few bits; gradients pass the rounding unchanged (straight-through)."""

    bits: Literal[8, 4] = knob(8, "bits per number")
    group_size: int | None = knob(
        None, "neighbouring channels that share a scale, a divisor of the slots' width; null = one scale per slot", ge=1
    )


class MemoryBankConfig(MemoryConfig):
    """Learned slots read by cross-attention; many slots in chapters, of which each position reads a few."""

    implementation = "graft.memories.memory_bank:MemoryBank"
    type: Literal["memory_bank"] = knob("memory_bank", "tag")
    bank: str = knob(
        "bank",
        "name of the bank: parts with one name read one bank (lower-case letters, digits, _)",
        pattern=r"^[a-z][a-z0-9_]*$",
        only_if={"sharing": ("shared", "every_k")},
    )
    sharing: Literal["shared", "per_layer", "every_k"] = knob(
        "shared", "one bank for all layers that read it; one each; or one for every sharing_k of those layers in a row"
    )
    sharing_k: int = knob(
        2, "layers with the bank that share one, counted among themselves", ge=1, only_if={"sharing": "every_k"}
    )
    num_slots: int | None = knob(None, "slots of the bank (M); null = num_chapters · chapter_size", ge=1)
    memory_dim: int | None = knob(
        None, "width of a slot; null = hidden_size", ge=1, only_if={"low_rank_mode": (None, "factorized")}
    )
    init_std: float = knob(0.02, "standard deviation of the slots at start (that of embeddings)", gt=0.0)
    num_heads: int = knob(8, "heads (N)", ge=1)
    num_kv_heads: int | None = knob(
        None, "heads of keys and values (K), each read by num_heads / num_kv_heads heads; null = num_heads", ge=1
    )
    head_dim: int | None = knob(
        None,
        "channels per head (H); null = hidden_size / num_heads (reduced_dim: rank / num_heads)",
        ge=1,
        only_if={"low_rank_mode": (None, "factorized")},
    )
    low_rank_mode: Literal["factorized", "reduced_dim"] | None = knob(
        None,
        "factorized: slots are A Bᵀ with A [M, rank]; reduced_dim: slots are rank wide, and so is the whole attention",
    )
    rank: int | None = knob(None, "rank of the slots (R)", ge=1, only_if={"low_rank_mode": SET})
    projection_rank: int | None = knob(
        None, "rank of the maps to queries, keys, values and out; null = full matrices of the model's kind", ge=1
    )
    zero_init_output: bool = knob(
        True,
        "the output starts at zero: the model starts as one without memory, bit for bit (but for norm_placement post, "
        "which norms the stream once more)",
    )
    gate: Literal["none", "scalar", "sigmoid"] = knob(
        "none",
        "factor on the output: tanh of a learned number that starts at 0 (it needs zero_init_output: false), or each "
        "position's sigmoid(w·x + b)",
    )
    attention_dropout: float = knob(0.0, "dropout rate on attention probabilities, in [0, 1)", ge=0.0, lt=1.0)
    quantization: BankQuantizationConfig | None = knob(
        None, "train with rounded slots; a bank trained without is converted by graft eval --memory-bits"
    )

    num_chapters: int | None = knob(None, "equal parts the bank is cut into (E); null = all read all slots", ge=2)
    chapter_size: int | None = knob(None, "slots per chapter; null = num_slots / num_chapters", ge=1, only_if=_CHAPTERS)
    top_k_chapters: int = knob(4, "chapters chosen for each position beside the shared ones", ge=1, only_if=_CHAPTERS)
    num_shared_chapters: int = knob(0, "chapters, the first ones, that every position reads", ge=0, only_if=_CHAPTERS)
    routed_scaling_factor: float = knob(1.0, "factor on the chosen chapters' weights", gt=0.0, only_if=_CHAPTERS)
    routing: Routing = knob(
        "token",
        "what chooses: the position itself; the mean of the last routing_window; the chunk before, of "
        "routing_chunk_size; the first routing_prefix_len of the document; or (encoders) the whole document",
        only_if=_CHAPTERS,
    )
    routing_window: int = knob(
        128, "positions of rolling's mean, its own included", ge=1, only_if={"routing": "rolling"}
    )
    routing_chunk_size: int = knob(64, "positions of a chunk", ge=1, only_if={"routing": "chunk"})
    routing_prefix_len: int = knob(64, "positions of prefix's mean", ge=1, only_if={"routing": "prefix"})
    allow_noncausal_routing: bool = knob(
        False,
        "allow sequence routing in a decoder, where it tells every position about later ones: its losses are too good, "
        "and all metrics are marked leaks_future",
        only_if={"routing": "sequence"},
    )
    router_aux_loss_coef: float = knob(
        0.01, "weight of the balance loss, 1 when chapters are used alike; 0 = none", ge=0.0, only_if=_CHAPTERS
    )
    router_variance_loss_coef: float = knob(
        0.0, "weight of (std / mean)² of the chapters' mean probabilities; 0 = none", ge=0.0, only_if=_CHAPTERS
    )
    router_z_loss_coef: float = knob(
        0.0, "weight of logsumexp(router logits)² (ST-MoE, 2202.08906: 1e-3); 0 = none", ge=0.0, only_if=_CHAPTERS
    )

    @property
    def slots(self) -> int:
        """Slots of the bank."""
        return self.num_slots or (self.num_chapters or 1) * (self.chapter_size or 1)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def routed_chapters(self) -> int:
        """Chapters that are chosen among."""
        return (self.num_chapters or 0) - self.num_shared_chapters

    @property
    def slots_read(self) -> int:
        """Slots that one position reads."""
        if self.num_chapters is None:
            return self.slots
        return self.slots // self.num_chapters * (self.num_shared_chapters + self.top_k_chapters)

    def bank_width(self, hidden_size: int) -> int:
        """Numbers of a slot as it is kept (factorized: of a row of A)."""
        return self.rank if self.rank is not None else self.memory_dim or hidden_size

    def problems(self) -> Iterator[Problem]:
        yield from self._slot_problems()
        if self.num_chapters is not None:
            yield from self._chapter_problems(self.num_chapters)
        if self.low_rank_mode is not None and self.rank is None:
            yield Problem(("rank",), f"{self.low_rank_mode} slots need a rank", "set rank, e.g. 64")
        if self.low_rank_mode == "reduced_dim" and self.rank is not None and self.rank % self.num_heads:
            yield Problem(
                ("num_heads",), f"{self.num_heads} heads do not divide rank {self.rank}", "change one of them"
            )
        if self.num_heads % self.kv_heads:
            yield Problem(
                ("num_kv_heads",), f"{self.kv_heads} key heads do not divide {self.num_heads} heads", "use a divisor"
            )
        if self.gate == "scalar" and self.zero_init_output:
            yield Problem(
                ("gate",),
                "gate and output both start at zero and give each other no gradient: the memory would never learn",
                "set zero_init_output: false (the gate alone makes the start exact)",
            )

    def _slot_problems(self) -> Iterator[Problem]:
        chapters, size = self.num_chapters, self.chapter_size
        if self.num_slots is None:
            if chapters is None or size is None:
                yield Problem(("num_slots",), "the bank has no size", "set num_slots, or num_chapters and chapter_size")
        elif chapters is not None and size is not None and self.num_slots != chapters * size:
            yield Problem(
                ("chapter_size",),
                f"{chapters} chapters of {size} are {chapters * size} slots, not num_slots {self.num_slots}",
                "leave out chapter_size or num_slots",
            )
        elif chapters is not None and self.num_slots % chapters:
            below = self.num_slots // chapters * chapters
            sizes = f"{below} or {below + chapters}" if below else f"{chapters}"
            yield Problem(
                ("num_slots",),
                f"{self.num_slots} slots do not divide into {chapters} chapters",
                f"the nearest that do: num_slots {sizes}, or num_chapters {_nearest_divisor(self.num_slots, chapters)}",
            )

    def _chapter_problems(self, chapters: int) -> Iterator[Problem]:
        if self.num_shared_chapters + self.top_k_chapters > chapters:
            yield Problem(
                ("top_k_chapters",),
                f"{self.num_shared_chapters} shared and {self.top_k_chapters} chosen are more than {chapters} chapters",
                "lower one of them, or raise num_chapters",
            )
        coefs = (self.router_aux_loss_coef, self.router_variance_loss_coef, self.router_z_loss_coef)
        if self.top_k_chapters == 1 and not any(coefs):
            yield Problem(
                ("top_k_chapters",),
                "a single chapter's weight divided by itself is always 1, so the router never learns",
                "set top_k_chapters: 2, or router_aux_loss_coef",
            )

    def problems_in(self, hidden_size: int) -> Iterator[Problem]:
        if self.low_rank_mode != "reduced_dim" and self.head_dim is None and hidden_size % self.num_heads:
            yield Problem(
                ("num_heads",), f"{self.num_heads} heads do not divide hidden_size {hidden_size}", "set head_dim"
            )
        if self.quantization is not None:
            yield from quantization_problems(self.quantization, self.bank_width(hidden_size))

    def problems_when(self, bidirectional: bool) -> Iterator[Problem]:
        if self.routing == "sequence" and not bidirectional and not self.allow_noncausal_routing:
            yield Problem(
                ("routing",),
                "sequence routing tells every position of a decoder about later ones",
                "use rolling, chunk or prefix; or allow_noncausal_routing: true, which marks all its losses",
            )
        if self.allow_noncausal_routing and bidirectional:
            yield Problem(("allow_noncausal_routing",), "an encoder may look ahead anyway", "remove it")

    def leaks_future(self, bidirectional: bool) -> bool:
        return self.num_chapters is not None and self.routing == "sequence" and not bidirectional

    def counts_choices(self) -> bool:
        return self.num_chapters is not None

    def silent_at_start(self) -> bool:
        return self.zero_init_output or self.gate == "scalar"

    def advice_in(self, hidden_size: int) -> Iterator[Problem]:
        if self.num_chapters is not None and self.top_k_chapters == 1:
            yield Problem(
                ("top_k_chapters",),
                "the weight of a single chosen chapter is always 1, so the router learns from its own losses alone",
                "choose two or more",
            )

    def shares(self) -> dict[str, tuple[Any, ...]]:
        if self.sharing == "per_layer":
            return {}
        group = self.sharing_k if self.sharing == "every_k" else None
        rounding = None if self.quantization is None else (self.quantization.bits, self.quantization.group_size)
        return {self.bank: (self.slots, self.memory_dim, self.low_rank_mode, self.rank, self.init_std, rounding, group)}


def quantization_problems(config: BankQuantizationConfig, width: int) -> Iterator[Problem]:
    """What keeps slots of a width from being rounded so."""
    if config.group_size is not None and width % config.group_size:
        yield Problem(
            ("quantization", "group_size"),
            f"groups of {config.group_size} do not divide {width} channels",
            "use a divisor",
        )
    if config.bits == 4 and width % 2:
        yield Problem(("quantization", "bits"), f"4-bit slots need an even width, not {width}", "use 8 bits")


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of ``number`` above 1 closest to ``wanted`` (the number itself divides)."""
    divisors = {d for i in range(1, int(number**0.5) + 1) if number % i == 0 for d in (i, number // i)} - {1}
    return min(divisors or {1}, key=lambda d: (abs(d - wanted), d))
