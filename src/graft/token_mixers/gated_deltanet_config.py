"""Config of the gated delta network's mixer."""

from collections.abc import Iterator
from typing import Literal

from graft.config.base import Problem, knob
from graft.config.families import Norm, TokenMixerConfig


class GatedDeltaNetConfig(TokenMixerConfig):
    """Linear attention whose memory fades, and is corrected by each key's error (2412.06464)."""

    implementation = "graft.token_mixers.gated_deltanet:GatedDeltaNet"
    type: Literal["gated_deltanet"] = knob("gated_deltanet", "tag")
    num_k_heads: int = knob(doc="heads of queries and keys (K)", ge=1)
    num_v_heads: int | None = knob(
        None, "heads of values (N), each with a memory of its own; a multiple of num_k_heads; null = as many", ge=1
    )
    head_dim: int = knob(doc="channels of a query and a key (H), free of hidden_size", ge=1)
    v_head_dim: int | None = knob(
        None, "channels of a value; null = head_dim (Qwen3-Next; the paper has twice as many)", ge=1
    )
    kernel_size: int = knob(
        4, "positions the convolution sees, itself included; centred in an encoder (4: the paper's)", ge=1
    )
    head_norm: Norm | None = knob(None, "norm of each value head's output; null = model.norm")

    def problems(self) -> Iterator[Problem]:
        if self.num_v_heads is not None and self.num_v_heads % self.num_k_heads:
            yield Problem(
                ("num_v_heads",),
                f"num_v_heads {self.num_v_heads} is no multiple of num_k_heads {self.num_k_heads}",
                "choose a multiple, or a divisor for num_k_heads",
            )
