"""The control that mixes nothing, as a part."""

from __future__ import annotations

from torch import Tensor

from graft.part import Context, Part, PartOutput, Site, State
from graft.shapes import Float
from graft.token_mixers.identity_config import IdentityConfig


class Identity(Part):
    """``y = x``: what a token mixer's place does when no information moves between positions.

    Source: MetaFormer Baselines for Vision (2210.13452), where IdentityFormer is the control that shows how much of a
    network's quality comes from its channel mixers and its shape. Deviations: none; the branch around it keeps its
    norm, so that a block with a pre-norm computes ``x + norm(x)``.

    Why not nothing at all: a block without the branch has other depth, other norms and another scale of the stream, so
    that it would differ from the mixer it is compared with in more than the mixing. Why no matrices: a map of each
    position alone is what the ``mlp`` is for.

    No state, no parameters, no matrix products.
    """

    def __init__(self, config: IdentityConfig, site: Site):
        super().__init__()
        self.config = config

    def forward(self, x_BTD: Float[Tensor, "B T D"], ctx: Context, state: State = None) -> PartOutput:
        return PartOutput(x_BTD)

    def flops_per_token(self, seq_len: int) -> float:
        return 0.0
