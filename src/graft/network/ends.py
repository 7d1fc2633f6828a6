"""The two ends of the network: token ids to vectors, vectors to logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.config.model import ModelConfig
from graft.config.roles import Role
from graft.initialization import Rng, normal_
from graft.ops.activations import soft_cap
from graft.ops.one_row import linear
from graft.shapes import Float, Int


def padded_rows(vocab_size: int, multiple: int) -> int:
    """``vocab_size`` rounded up to a multiple."""
    return math.ceil(vocab_size / multiple) * multiple


class TokenEmbedding(nn.Module):
    """``dropout(norm(scale · table[id] + position vector))``; each of them as configured.

    Args:
        config: the model's config.
        num_rows: rows of the table, padding included.
    """

    role: Role = "embedding"

    def __init__(self, config: ModelConfig, num_rows: int):
        super().__init__()
        width = config.hidden_size
        options = config.embedding
        self.scale = {"none": 1.0, "sqrt_hidden_size": width**0.5}.get(str(options.scale), options.scale)
        self.std = config.init.embedding_std or config.init.std
        self.weight = nn.Parameter(torch.empty(num_rows, width))
        position = options.position
        if position is not None and position.acts_in == "embedding":
            self.position = position.build(width, init_std=config.init.std)
        else:  # a position that may act anywhere (none) adds nothing here
            self.position = None
        self.norm = options.norm.build(width) if options.norm is not None else None
        self.dropout = nn.Dropout(options.dropout)

    def init_parameters(self, rng: Rng) -> None:
        normal_(self.weight, self.std, rng("weight"))

    def forward(self, ids_BT: Int[Tensor, "B T"], positions_BT: Int[Tensor, "#B T"]) -> Float[Tensor, "B T D"]:
        x_BTD = F.embedding(ids_BT, self.weight)
        if self.scale != 1.0:
            x_BTD = x_BTD * self.scale
        if self.position is not None:
            x_BTD = x_BTD + self.position(positions_BT)
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return self.dropout(x_BTD)


class Head(nn.Module):
    """``logits = softcap(x Wᵀ + b)`` in fp32, over the vocabulary alone.

    W is the head's own matrix, or the embedding table when tied. The rows that pad the vocabulary take part in the
    product, because matrix units like round sizes, and are cut off at once: they are never predicted and their
    gradient is zero. The soft cap is ``c·tanh(z/c)`` (Gemma 2, 2408.00118).

    Args:
        config: the model's config.
        vocab_size: ids that can be predicted (V).
        num_rows: rows of the matrix, padding included.
    """

    role: Role = "head"

    def __init__(self, config: ModelConfig, vocab_size: int, num_rows: int):
        super().__init__()
        options = config.head
        self.vocab_size = vocab_size
        self.softcap = options.logit_softcap
        self.std = config.init.std
        tied = options.tie_word_embeddings
        self.weight = None if tied else nn.Parameter(torch.empty(num_rows, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(num_rows)) if options.bias else None

    def init_parameters(self, rng: Rng) -> None:
        if self.weight is not None:
            normal_(self.weight, self.std, rng("weight"))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_BTD: Float[Tensor, "B T D"], table_VD: Float[Tensor, "rows D"]) -> Float[Tensor, "B T V"]:
        logits_BTV = linear(x_BTD, table_VD, self.bias)[..., : self.vocab_size]
        logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        return logits_BTV if self.softcap is None else soft_cap(logits_BTV, self.softcap)
