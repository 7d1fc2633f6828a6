"""Config of gated linear attention."""

from collections.abc import Iterator
from typing import Literal

from graft.config.base import Problem, knob
from graft.config.families import Norm, TokenMixerConfig


class GLAConfig(TokenMixerConfig):
    """Linear attention whose memory decays per channel, by a factor that depends on the token (2312.06635)."""

    implementation = "graft.token_mixers.gla:GLA"
    type: Literal["gla"] = knob("gla", "tag")
    num_heads: int = knob(doc="heads (N), each with a memory of head_dim × v_head_dim numbers", ge=1)
    head_dim: int | None = knob(
        None, "channels of a head's queries and keys (H); null = hidden_size / 2 / num_heads (the paper's half)", ge=1
    )
    v_head_dim: int | None = knob(
        None, "channels of a head's values; null = hidden_size / num_heads (the paper's width)", ge=1
    )
    gate_low_rank_dim: int = knob(16, "rank of the map that makes the decays (the paper's choice)", ge=1)
    gate_temperature: float = knob(
        16.0, "decays are sigmoid(·)^(1 / this): larger remembers longer (the paper's τ)", gt=0.0
    )
    head_norm: Norm | None = knob(None, "norm of each head's output; null = model.norm")

    def problems_in(self, hidden_size: int) -> Iterator[Problem]:
        for name, part, given in (("head_dim", 2, self.head_dim), ("v_head_dim", 1, self.v_head_dim)):
            if given is None and hidden_size % (part * self.num_heads):
                share = "half of hidden_size" if part == 2 else "hidden_size"
                yield Problem(
                    ("num_heads",),
                    f"num_heads {self.num_heads} does not divide {share} {hidden_size}",
                    f"set {name}, or another number of heads",
                )
