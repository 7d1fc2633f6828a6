"""Config of next-token prediction."""

from typing import Literal

from graft.config.base import knob
from graft.config.families import ObjectiveConfig


class CausalLMConfig(ObjectiveConfig):
    """Cross-entropy of the next token, plus an optional z-loss (PaLM, 2204.02311)."""

    implementation = "graft.objectives.causal_lm:CausalLM"
    supports_bidirectional = False
    type: Literal["causal_lm"] = knob("causal_lm", "tag")
    z_loss_coef: float = knob(
        0.0, "weight of logsumexp(logits)², on the capped logits that enter the cross-entropy", ge=0.0
    )
