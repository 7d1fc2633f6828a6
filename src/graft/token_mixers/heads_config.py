"""The fields that all attention over heads has, however it weighs values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from graft.config.base import Problem, knob
from graft.config.families import Norm, Position, TokenMixerConfig
from graft.token_mixers.head_problems import embedding_position_problems, head_problems


class HeadsConfig(TokenMixerConfig):
    """Base of attention configs: heads, window, positions, head norms, biases, value residual."""

    num_heads: int = knob(doc="query heads (N)", ge=1)
    num_kv_heads: int | None = knob(
        None, "key/value heads (K), a divisor of num_heads; null = num_heads, 1 = multi-query", ge=1
    )
    head_dim: int | None = knob(
        None, "channels per head (H), free of hidden_size; null = hidden_size / num_heads", ge=1
    )
    sliding_window: int | None = knob(
        None, "keys a query sees, itself included; in an encoder it sees as many ahead; null = all", ge=1
    )
    position: Position = knob(doc="how positions enter: {type: rope | xpos | hope | alibi | none}")
    qk_norm: Norm | None = knob(None, "norm on each head's q and k before positions; null = none")
    qkv_bias: bool = knob(False, "bias on the q, k and v projections (Qwen2)")
    output_bias: bool = knob(False, "bias on the output projection")
    value_residual: bool = knob(
        False, "mix the first such layer's values into this one's with learned weights (2410.17897)"
    )

    def problems(self) -> Iterator[Problem]:
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            yield Problem(
                ("num_kv_heads",),
                f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}",
                "choose a divisor of num_heads",
            )
        yield from embedding_position_problems(self.position)

    def passes_on(self, hidden_size: int) -> Mapping[str, tuple[int, ...]]:
        """Values, as many as key heads."""
        if not self.value_residual:
            return {}
        return {"value_residual": (self.num_kv_heads or self.num_heads, self.head_dim or hidden_size // self.num_heads)}

    def problems_in(self, hidden_size: int) -> Iterator[Problem]:
        yield from head_problems(hidden_size, self.num_heads, self.head_dim, self.position)
