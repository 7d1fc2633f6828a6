"""Sigmoid attention as a part."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from graft.config.roles import Role
from graft.initialization import Rng
from graft.ops.attention_mask import Scoring, Visibility
from graft.ops.sigmoid_attention import sigmoid_attention
from graft.ops.sigmoid_attention_reference import Weighing
from graft.part import Site
from graft.token_mixers.heads import MultiHead
from graft.token_mixers.sigmoid_attention_config import SigmoidAttentionConfig


class SigmoidAttention(MultiHead):
    """Sigmoid attention (arXiv 2409.04431): ``o_proj(Σ_j σ(q·k_j / √H + b) v_j)`` per head, no sum over keys is 1.

    b = −log n keeps the sum of weights near 1 at the start, where scores are near 0. The paper also keeps the norm of
    the output in check: ``qk_norm``, ``norm_placement: sandwich`` (its hybrid norm) and ``layer_scale`` do that here.
    `graft.token_mixers.heads.MultiHead` has what comes before the scores, the state and the count of FLOPs.

    Deviations: n is the number of keys that each query sees, not the length of the training sequences, so that the
    start of a document, packed documents and decoding are alike; grouped queries, windows and learned biases are added;
    ``normalize`` divides by the sum of weights, as the paper does not.

    Args:
        config: what is computed.
        site: the surroundings.
    """

    param_roles: ClassVar[dict[str, Role]] = {"head_bias": "scalar"}

    def __init__(self, config: SigmoidAttentionConfig, site: Site):
        super().__init__(config, site)
        self.bias = None if config.bias == "auto" else config.bias
        self.normalize = config.normalize
        self.head_bias = nn.Parameter(torch.empty(self.num_heads)) if config.learned_bias else None

    def init_parameters(self, rng: Rng) -> None:
        """The learned bias starts at 0."""
        if self.head_bias is not None:
            nn.init.zeros_(self.head_bias)

    def attend(self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visibility: Visibility) -> Tensor:
        """A sigmoid of each visible key's score; see `MultiHead.attend`."""
        scoring = Scoring(self.head_dim**-0.5, None, *self.distance_terms(q_BTNH.device))
        weighing = Weighing(self.bias, self.head_bias, self.normalize)
        return sigmoid_attention(q_BTNH, k_BSKH, v_BSKH, visibility, scoring, weighing, kernels=self.kernels)
