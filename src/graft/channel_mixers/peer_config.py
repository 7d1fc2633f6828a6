"""Config of parameter-efficient expert retrieval."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from graft.config.base import Problem, knob
from graft.config.families import ChannelMixerConfig


class PeerConfig(ChannelMixerConfig):
    """PEER (2407.04153): each head picks a few of very many tiny experts by product keys."""

    implementation = "graft.channel_mixers.peer:Peer"
    type: Literal["peer"] = knob("peer", "tag")
    product_key_dims: tuple[int, ...] = knob(
        doc="sides of the grid of experts, 1 to 4 numbers, each at least 1; [1024, 1024] in the paper",
        min_length=1,
        max_length=4,
    )
    num_experts: int | None = knob(
        None, "experts (E); null = the product of product_key_dims, which it must equal", ge=1
    )
    num_experts_per_tok: int = knob(
        16, "experts each head picks for a position, at most num_experts; 16 in the paper", ge=1
    )
    num_heads: int = knob(8, "queries per position (N); all read the same keys and experts; 8 in the paper", ge=1)
    expert_hidden_size: int = knob(1, "hidden units of an expert (h); 1 in the paper", ge=1)
    query_dim: int = knob(
        256, "channels of a query, per head, all axes together; divisible by the axes; 256 in the paper", ge=1
    )
    query_norm: Literal["batch", "layer", "rms", "none"] = knob(
        "layer",
        "norm of the queries, which spreads the choice over more experts; batch is the paper's, whose statistics mix "
        "the sequences of a micro-batch and both directions of time, so layer is the default",
    )
    qk_cosine: bool = knob(
        False, "scores are cosines per axis times a learned temperature per head, √query_dim at the start"
    )
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = knob(
        "gelu", "nonlinearity of the hidden units; relu2 = relu² (2109.08668)"
    )
    dropout: float = knob(
        0.0,
        "rate at which a head's chosen expert is left out of a position's sum while training, in [0, 1)",
        ge=0,
        lt=1,
    )
    track_usage: bool = knob(
        True, "count how often each expert is chosen while training: 8 bytes per expert and layer, for telemetry"
    )

    @property
    def grid_size(self) -> int:
        """Experts there are."""
        return math.prod(self.product_key_dims)

    def counts_choices(self) -> bool:
        return self.track_usage

    def problems(self) -> Iterator[Problem]:
        axes = len(self.product_key_dims)
        if any(dim < 1 for dim in self.product_key_dims):
            yield Problem(
                ("product_key_dims",), f"{list(self.product_key_dims)} has a side below 1", "make it at least 1"
            )
            return
        if self.num_experts not in (None, self.grid_size):
            yield Problem(
                ("num_experts",),
                f"a grid of {' x '.join(map(str, self.product_key_dims))} has {self.grid_size} experts, "
                f"not {self.num_experts}",
                "remove num_experts, or change product_key_dims",
            )
        if self.num_experts_per_tok > self.grid_size:
            yield Problem(
                ("num_experts_per_tok",),
                f"a head cannot pick {self.num_experts_per_tok} of {self.grid_size} experts",
                "lower it, or enlarge product_key_dims",
            )
        if self.query_dim % axes:
            yield Problem(
                ("query_dim",),
                f"{self.query_dim} channels do not divide among {axes} axes",
                f"set a multiple of {axes}",
            )

    def advice_in(self, hidden_size: int) -> Iterator[Problem]:
        if self.query_norm == "batch":
            yield Problem(
                ("query_norm",),
                "while training, the statistics of batch norm let positions see later ones and other documents, and "
                "change with the micro-batch",
                "use layer, or keep batch to follow the paper",
            )
        reads = self.num_heads * self.num_experts_per_tok
        if reads >= self.grid_size:
            yield Problem(
                ("num_experts_per_tok",),
                f"{reads} reads per position of {self.grid_size} experts choose next to nothing",
                "enlarge product_key_dims, or lower num_heads or num_experts_per_tok",
            )
