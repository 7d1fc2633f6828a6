"""Config of multi-head latent attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from graft.config.base import Problem, knob
from graft.config.families import Norm, Position, PositionConfig, TokenMixerConfig
from graft.norms.rms_norm_config import RMSNormConfig
from graft.positions.hope_config import HopeConfig
from graft.positions.rope_config import RopeConfig, YarnScaling
from graft.positions.xpos_config import XposConfig


def magnitude(factor: float, mscale: float) -> float:
    """``0.1 · mscale · ln(factor) + 1``: by how much YaRN scales for a context ``factor`` times longer."""
    return 0.1 * mscale * math.log(factor) + 1.0


class MLAConfig(TokenMixerConfig):
    """Multi-head latent attention (DeepSeek-V2): keys and values made of one small vector per position."""

    implementation = "graft.token_mixers.mla:MLA"
    type: Literal["mla"] = knob("mla", "tag")
    num_heads: int = knob(doc="heads (N); each has keys and values of its own", ge=1)
    q_lora_rank: int | None = knob(
        None, "channels that queries are made of; below hidden_size to save anything; null = the stream itself", ge=1
    )
    kv_lora_rank: int = knob(doc="channels of the latent that keys and values are made of, kept while decoding", ge=1)
    qk_nope_head_dim: int = knob(doc="channels per head of queries and keys without position", ge=1)
    qk_rope_head_dim: int = knob(doc="rotated channels per head; even; the key's are shared by all heads", ge=2)
    v_head_dim: int = knob(doc="channels per head of values", ge=1)
    sliding_window: int | None = knob(None, "keys a query sees, itself included; null = all", ge=1)
    latent_norm: Norm = knob(doc="norm on both latents; RMSNorm as published", factory=RMSNormConfig)
    position: Position = knob(
        doc="what gives the qk_rope_head_dim channels their position: rope; xpos and hope fade them with distance",
        factory=RopeConfig,
    )
    mscale: float = knob(
        1.0, "YaRN: cos and sin get m(mscale) / m(mscale_all_dim), m(x) = 0.1·x·ln(factor) + 1; 1 = YaRN's own", ge=0.0
    )
    mscale_all_dim: float = knob(
        0.0, "YaRN: scores get m(mscale_all_dim)², also the channels without position; 0 = no factor", ge=0.0
    )
    rope_interleave: bool = knob(
        False, "a rotated pair is channels (2i, 2i + 1), as in DeepSeek's weights; false: (i, i + qk_rope_head_dim / 2)"
    )

    def problems(self) -> Iterator[Problem]:
        if not isinstance(self.position, RopeConfig | XposConfig | HopeConfig):
            message = f"{self.position.tag} does not act on pairs of channels"
            yield Problem(("position", "type"), message, "use rope, xpos or hope")
        if isinstance(self.position, RopeConfig) and self.position.partial_rotary_factor != 1.0:
            yield Problem(
                ("position", "partial_rotary_factor"),
                "all of qk_rope_head_dim is rotated",
                "remove partial_rotary_factor and divide channels between qk_nope_head_dim and qk_rope_head_dim",
            )
        elif self.qk_rope_head_dim % 2:
            yield Problem(
                ("qk_rope_head_dim",), f"{self.qk_rope_head_dim} channels cannot be rotated in pairs", "make it even"
            )
        if self.rope_interleave and not isinstance(self.position, RopeConfig | XposConfig):
            yield Problem(("rope_interleave",), "it says which channels rope and xpos rotate", "remove it")
        if (self.mscale, self.mscale_all_dim) == (1.0, 0.0):
            return
        yarn = self._yarn()
        if yarn is None:
            yield Problem(
                ("mscale" if self.mscale != 1.0 else "mscale_all_dim",),
                "mscale and mscale_all_dim do nothing without YaRN",
                "set position.scaling: {type: yarn, …}, or remove them",
            )
        elif yarn.attention_factor is not None:
            yield Problem(
                ("position", "scaling", "attention_factor"),
                "attention_factor and mscale both say what cos and sin are multiplied by",
                "remove one of them",
            )

    def _yarn(self) -> YarnScaling | None:
        scaling = self.position.scaling if isinstance(self.position, RopeConfig) else None
        return scaling if isinstance(scaling, YarnScaling) else None

    def built_position(self) -> PositionConfig:
        """The position, with `mscale` and `mscale_all_dim` worked into a rotation's factor on cos and sin."""
        yarn = self._yarn()
        if yarn is None or yarn.attention_factor is not None:
            return self.position
        ratio = magnitude(yarn.factor, self.mscale) / magnitude(yarn.factor, self.mscale_all_dim)
        return self.position.replace(scaling=yarn.replace(attention_factor=ratio))

    def scale(self) -> float:
        """The factor on q·k: the root of one over the channels of a query, and `mscale_all_dim`'s."""
        root = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        yarn = self._yarn()
        return root if yarn is None else root * magnitude(yarn.factor, self.mscale_all_dim) ** 2

    def advice_in(self, hidden_size: int) -> Iterator[Problem]:
        queries = self.num_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        if self.q_lora_rank is not None and self.q_lora_rank >= min(hidden_size, queries):
            yield Problem(
                ("q_lora_rank",),
                f"{self.q_lora_rank} channels compress nothing of a stream of {hidden_size} for queries of {queries}",
                "lower it, or set null for a direct projection",
            )
        per_position = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        if 2 * self.kv_lora_rank >= per_position:
            yield Problem(
                ("kv_lora_rank",),
                f"a latent of {self.kv_lora_rank} is no less than half of the {per_position} channels of keys and "
                "values it stands for",
                "lower it, or use attention",
            )
        elif self.kv_lora_rank >= hidden_size:
            message = f"a latent of {self.kv_lora_rank} compresses nothing of a stream of {hidden_size}"
            yield Problem(("kv_lora_rank",), message, "lower it")
