"""Softmax attention as a part."""

from __future__ import annotations

from torch import Tensor

from graft.ops.attention import attention
from graft.ops.attention_mask import Scoring, Visibility
from graft.part import Site
from graft.token_mixers.attention_config import AttentionConfig
from graft.token_mixers.heads import MultiHead


class Attention(MultiHead):
    """Softmax attention (arXiv 1706.03762, section 3.2), multi-head, grouped-query (2305.13245) or multi-query.

    ``o_proj(softmax(cap(q·k / √s) − distance term) v)`` per head, s = query_pre_attn_scalar. Scores are soft-capped
    (2408.00118) before distances and mask; `graft.token_mixers.heads.MultiHead` has what comes before the scores, the
    state and the count of FLOPs.

    Deviations: projections have no bias unless asked; heads need not fill hidden_size; a window counts the query itself
    and, in an encoder, reaches as far to both sides; attention dropout acts on probabilities, in training only.

    Args:
        config: what is computed.
        site: the surroundings.
    """

    def __init__(self, config: AttentionConfig, site: Site):
        super().__init__(config, site)
        self.logit_softcap = config.logit_softcap
        self.dropout = config.dropout
        self.scale = (config.query_pre_attn_scalar or self.head_dim) ** -0.5

    def attend(self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visibility: Visibility) -> Tensor:
        """Softmax over the visible keys; see `MultiHead.attend`."""
        return attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            visibility,
            Scoring(self.scale, self.logit_softcap, *self.distance_terms(q_BTNH.device)),
            dropout=self.dropout if self.training else 0.0,
            kernels=self.kernels,
            kernel=self.kernel,
        )
