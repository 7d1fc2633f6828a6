"""Config of softmax attention."""

from __future__ import annotations

from typing import Literal

from graft.config.base import knob
from graft.token_mixers.heads_config import HeadsConfig


class AttentionConfig(HeadsConfig):
    """Softmax attention: multi-head, grouped-query or multi-query; causal or bidirectional; global or sliding."""

    implementation = "graft.token_mixers.attention:Attention"
    type: Literal["attention"] = knob("attention", "tag")
    query_pre_attn_scalar: float | None = knob(None, "scores are multiplied by this^(−1/2); null = head_dim", gt=0.0)
    logit_softcap: float | None = knob(None, "scores become c·tanh(scores/c) (Gemma 2); null = none", gt=0.0)
    dropout: float = knob(0.0, "dropout rate on attention probabilities, in [0, 1)", ge=0.0, lt=1.0)
