"""Config of sigmoid attention."""

from __future__ import annotations

from typing import Literal

from graft.config.base import knob
from graft.token_mixers.heads_config import HeadsConfig


class SigmoidAttentionConfig(HeadsConfig):
    """Sigmoid attention (2409.04431): each key is weighed by σ(score + bias) by itself, not against the others."""

    implementation = "graft.token_mixers.sigmoid_attention:SigmoidAttention"
    type: Literal["sigmoid_attention"] = knob("sigmoid_attention", "tag")
    bias: Literal["auto"] | float = knob(
        "auto",
        "added to every score; auto = −log of the number of keys the query sees (its document, window and past), so "
        "that weights add up to about 1 at the start; a number is used as it is",
    )
    learned_bias: bool = knob(False, "add a learned number per head to the bias; starts at 0")
    normalize: bool = knob(
        False, "divide a query's weights by (their sum + 1e-6); with bias 0 this is the row-normalised sigmoid"
    )
