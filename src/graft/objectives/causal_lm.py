"""Next-token prediction."""

from __future__ import annotations

from graft.data.batch import Batch
from graft.errors import ConfigError
from graft.model import Model
from graft.objectives.base import LossTerms, Objective, aux_total, predict
from graft.objectives.causal_lm_config import CausalLMConfig


class CausalLM(Objective):
    """Σ over targets of ``ce + z_loss_coef · logsumexp(logits)²``; z-loss as in PaLM (2204.02311), section 5.

    Metrics: ``ce``, nats of cross-entropy alone, and ``z_loss``, the sum of squares before its coefficient. Deviation:
    z is computed on the soft-capped logits, the ones that enter the cross-entropy.
    """

    def __init__(self, config: CausalLMConfig):
        self.config = config

    def loss(self, model: Model, batch: Batch) -> LossTerms:
        """See `Objective.loss`. Raises ConfigError for a bidirectional model, which would see what it predicts."""
        if model.config.bidirectional:
            raise ConfigError(
                "next-token prediction with a bidirectional model: every target is among its inputs",
                where="model.bidirectional",
                fix="set it to false, or use another objective",
            )
        features = model.features(
            batch.input_ids_BT, positions_BT=batch.positions_BT, segment_ids_BT=batch.segment_ids_BT
        )
        sums = predict(model, features.x_BTD, batch.targets_BT, z_loss_coef=self.config.z_loss_coef)
        metrics = {"ce": sums.ce, "z_loss": sums.z}
        return LossTerms(sums.loss, aux_total(features.aux, sums.loss), metrics, features.usage)
