"""The feed-forward network."""

from __future__ import annotations

from torch import Tensor, nn

from graft.channel_mixers.mlp_config import MlpConfig
from graft.linears.joint import joint_linear
from graft.ops.activations import ACTIVATIONS
from graft.part import Context, Part, PartOutput, Site, State, linear_flops
from graft.shapes import Float


class Mlp(Part):
    """Feed-forward network: ``W_down(act(W_gate x) ⊙ W_up x)`` when gated, ``W_down act(W_up x)`` when plain.

    Source: GLU Variants Improve Transformer (2002.05202; silu gives SwiGLU, gelu GeGLU) and Attention Is All You Need
    (1706.03762). Deviation: no biases unless asked for. Acts on each position alone: no state.
    Cost: 2 · (3 or 2) · D · F forward FLOPs per position.
    """

    def __init__(self, config: MlpConfig, site: Site):
        super().__init__()
        self.config = config
        width, inner = site.hidden_size, config.intermediate_size
        self.gate_proj = site.make_linear(width, inner, role="mlp", bias=config.bias) if config.gated else None
        self.up_proj = site.make_linear(width, inner, role="mlp", bias=config.bias)
        self.down_proj = site.make_linear(inner, width, role="mlp", bias=config.bias, residual_output=True)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Float[Tensor, "B T D"], ctx: Context, state: State = None) -> PartOutput:
        if self.gate_proj is None:
            inner_BTF = self.activation(self.up_proj(x_BTD))
        else:
            gate_BTF, up_BTF = joint_linear(x_BTD, (self.gate_proj, self.up_proj))
            inner_BTF = self.activation(gate_BTF) * up_BTF
        return PartOutput(self.down_proj(self.dropout(inner_BTF)))

    def flops_per_token(self, seq_len: int) -> float:
        return float(linear_flops(self))
