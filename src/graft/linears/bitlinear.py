"""The ternary linear map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.config.roles import Role
from graft.initialization import Rng
from graft.linears.bitlinear_config import BitLinearConfig
from graft.linears.dense import Dense
from graft.linears.packed_ternary import PackedTernary
from graft.ops.one_row import linear
from graft.ops.ternary import fake_int8_rows, fake_ternary


class TernaryOperands(nn.Module):
    """Rows and matrices as BitNet b1.58 multiplies them (see `BitLinear`), and how far quantisation has come in.

    Args:
        config: the norm, and how quantisation comes in.
        in_features: channels of a row.
    """

    updates: Tensor | None

    def __init__(self, config: BitLinearConfig, in_features: int):
        super().__init__()
        self.warmup_steps = config.warmup_steps
        self.norm = None if config.norm is None else config.norm.build(in_features)
        self.register_buffer("updates", torch.empty((), dtype=torch.int64) if config.warmup_steps else None)

    def init_parameters(self, rng: Rng) -> None:
        if self.updates is not None:
            self.updates.zero_()

    def count_update(self) -> None:
        """One more update was made (`graft.part.CountsUpdates`)."""
        if self.updates is not None:
            self.updates += 1

    def fully_quantised(self) -> bool:
        """λ has reached 1."""
        return self.updates is None or int(self.updates) >= self.warmup_steps

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [..., in] normed and rounded to 8 bits, matrices [..., out, in] made ternary, each its own."""
        share = None
        if self.updates is not None:
            share = (self.updates.to(torch.float32) / self.warmup_steps).clamp(max=1.0)
        x = x if self.norm is None else self.norm(x)
        return fake_int8_rows(x, share), fake_ternary(weight, share)


class BitLinear(Dense):
    """``y = Q(n(x)) T(W)ᵀ + b``: BitNet b1.58 (2402.17764, section 2), from BitNet (2310.11453).

    ``T(W) = s · round_clip(W / s, −1, 1)`` with ``s = mean |W|`` of the whole matrix; ``Q`` rounds every row of
    channels to whole multiples of its largest absolute value over 127; n is a norm over the last axis alone, so that
    no position reads another. Gradients pass both roundings unchanged (straight-through); statistics and roundings
    are made in fp32 or wider. W is trained in full precision, and starts as in a dense map.

    Deviations: the norm is any of the norms there are, with its learned gain, and may be left out; quantisation may
    come in gradually: with λ growing from 0 to 1 over ``warmup_steps`` updates, x and W stand ``λ`` of the way to
    their quantised values. At λ = 0 this is the dense map of n(x), bit for bit.

    Args:
        config: the norm, and how quantisation comes in.
        in_features: channels in.
        out_features: channels out.
        bias: add b, which is not quantised.
        role: the weight's role.
        init_std: standard deviation of W at start.
    """

    def __init__(
        self, config: BitLinearConfig, in_features: int, out_features: int, *, bias: bool, role: Role, init_std: float
    ):
        super().__init__(config, in_features, out_features, bias=bias, role=role, init_std=init_std)
        self.operands = TernaryOperands(config, in_features)

    def forward(self, input: Tensor) -> Tensor:
        x, weight = self.operands(input, self.weight)
        return linear(x, weight, self.bias)

    def packed(self) -> PackedTernary:
        """The layer for inference, two bits per weight (an empty one on the meta device)."""
        sizes = self.in_features, self.out_features
        layer = PackedTernary(*sizes, norm=self.operands.norm, bias=self.bias is not None).to(self.weight.device)
        if not self.weight.is_meta:
            layer.fill(self.weight, self.bias)
        return layer
