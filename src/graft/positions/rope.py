"""Rotary position embedding and its length scalings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graft.errors import ConfigError
from graft.positions.base import TablePosition, Tables
from graft.positions.rope_config import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from graft.shapes import Float, Int


def inverse_frequencies(config: RopeConfig, rotary_dim: int, device: torch.device) -> Tensor:
    """[rotary_dim / 2] fp32: radians by which pair i turns per position, with the scaling applied.

    Unscaled it is theta^(−2i / rotary_dim), computed in fp32 as the pretrained models' own code does.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    plain = 1.0 / (config.theta**exponents)
    match config.scaling:
        case LinearScaling(factor=factor):
            return plain / factor
        case YarnScaling() as scaling:
            return _yarn(plain, config.theta, scaling)
        case Llama3Scaling() as scaling:
            return _llama3(plain, scaling)
        case None:
            return plain


def _yarn(plain: Tensor, theta: float, scaling: YarnScaling) -> Tensor:
    """YaRN's "NTK-by-parts" (arXiv 2309.00071, section 3.2): interpolates pairs that turn less than beta_slow times
    over the trained length, keeps those that turn more than beta_fast times, and blends linearly over the pair's index
    between (whole indices, as the published models do).
    """
    rotary_dim = 2 * plain.shape[0]

    def index_of(rotations: float) -> float:
        span = scaling.original_max_seq_len / (rotations * 2 * math.pi)
        return rotary_dim * math.log(span) / (2 * math.log(theta))

    low = max(math.floor(index_of(scaling.beta_fast)), 0)
    high = min(math.ceil(index_of(scaling.beta_slow)), rotary_dim - 1)
    width = (high - low) or 0.001  # one index: a step instead of a ramp
    pairs = torch.arange(plain.shape[0], dtype=torch.float32, device=plain.device)
    interpolated = ((pairs - low) / width).clamp(0, 1)
    return plain / scaling.factor * interpolated + plain * (1 - interpolated)


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Llama 3.1's scaling: wavelengths above original/low are divided by factor, those below original/high are kept,
    and between the two the frequency is blended by how often it turns over the trained length.
    """
    turns = scaling.original_max_seq_len * plain / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain


def attention_factor(config: RopeConfig) -> float:
    """What cos and sin are multiplied by: YaRN's 0.1·ln(factor) + 1 (its equation 22) unless given; else 1."""
    if not isinstance(config.scaling, YarnScaling):
        return 1.0
    given = config.scaling.attention_factor
    return 0.1 * math.log(config.scaling.factor) + 1.0 if given is None else given


class Rope(TablePosition):
    """Rotary position embedding (RoFormer, arXiv 2104.09864, equations 14-16 and 34).

    Pair i of the first r = partial_rotary_factor·H channels turns by ``position · inverse_frequencies[i]``, so that
    q_m·k_n depends on m − n alone. Channels past r stay as they are.
    Deviations: a pair is (i, i + r/2), not (2i, 2i + 1) (the "rotate-half" order of Llama and Gemma weights: the same
    map up to an order of channels); tables and rotation are fp32 (fp64 inputs stay fp64) whatever the dtype of q.

    Args:
        config: theta, share of rotated channels, scaling.
        num_heads: N; not used, every attention position is built with it.
        head_dim: H.

    Raises:
        ConfigError: r is zero or odd.
    """

    def __init__(self, config: RopeConfig, num_heads: int, head_dim: int):
        super().__init__()
        self.config = config
        self.rotary_dim = int(head_dim * config.partial_rotary_factor)
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ConfigError(
                f"{config.partial_rotary_factor} of head_dim {head_dim} is {self.rotary_dim} rotated channels",
                where="position.partial_rotary_factor",
                expected="an even number of at least 2",
                fix="change head_dim or partial_rotary_factor",
            )
        self.table_key = f"rope/{self.rotary_dim}/{config.model_dump_json()}"

    def tables(self, positions_BT: Int[Tensor, "B T"]) -> Tables:
        """cos and sin, each [B, T, 1, r/2] fp32 (the 1 stands for the heads)."""
        frequencies = inverse_frequencies(self.config, self.rotary_dim, positions_BT.device)
        angles = positions_BT[:, :, None, None].float() * frequencies
        factor = attention_factor(self.config)
        return angles.cos() * factor, angles.sin() * factor

    def encode(self, x_BTNH: Float[Tensor, "B T N H"], tables: Tables) -> Float[Tensor, "B T N H"]:
        """[B, T, N, H] with the first r channels of each head rotated."""
        cos, sin = tables
        head, rest = x_BTNH.split([self.rotary_dim, x_BTNH.shape[-1] - self.rotary_dim], dim=-1)
        first, second = head.unflatten(-1, (2, -1)).unbind(-2)  # their gradients are stacked; those of slices, padded
        turned = (first * cos - second * sin, second * cos + first * sin)
        turned = torch.stack([half.to(x_BTNH.dtype) for half in turned], dim=-2).flatten(-2)
        return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)
