"""Config of retention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from graft.config.base import Problem, knob
from graft.config.families import TokenMixerConfig
from graft.positions.none_config import NoPositionConfig
from graft.positions.rope_config import RopeConfig
from graft.token_mixers.head_problems import head_problems


class RetentionConfig(TokenMixerConfig):
    """Multi-scale retention (RetNet, 2307.08621): linear attention whose past fades by a constant factor per head."""

    implementation = "graft.token_mixers.retention:Retention"
    type: Literal["retention"] = knob("retention", "tag")
    num_heads: int = knob(doc="heads (N), each with a fading factor of its own", ge=1)
    head_dim: int | None = knob(None, "channels of a head's queries and keys (H); null = hidden_size / num_heads", ge=1)
    value_factor: int = knob(2, "channels of a head's values per channel of its queries; 2 in the paper", ge=1)
    position: RopeConfig | NoPositionConfig = knob(
        doc="rotation of q and k: {type: rope} as in the paper (it and the fading are its xPos), or {type: none}",
        factory=RopeConfig,
        discriminator="type",
    )
    score_norm: bool = knob(
        True, "divide scores by √(row sum of the factors), then by max(|row sum|, 1): the paper's; keeps sums in range"
    )
    head_norm: Literal["rms_norm", "layer_norm"] = knob(
        "rms_norm", "norm of each head's output, without weights; layer_norm is the paper's group norm"
    )
    head_norm_eps: float = knob(1e-6, "added to the mean square (or variance) of a head's output", gt=0.0)
    chunk_size: int = knob(64, "positions per chunk of the training form: changes the cost, not the numbers", ge=1)

    def problems_in(self, hidden_size: int) -> Iterator[Problem]:
        yield from head_problems(hidden_size, self.num_heads, self.head_dim, self.position)
