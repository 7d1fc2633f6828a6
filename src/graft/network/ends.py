"""The two ends of the network: token ids to vectors, vectors to logits."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from graft.config.ends import HeadTransformConfig
from graft.config.model import ModelConfig
from graft.config.roles import Role
from graft.initialization import Rng, normal_
from graft.network.embedding_conv import embedding_conv
from graft.ops.activations import ACTIVATIONS, soft_cap
from graft.ops.one_row import linear
from graft.ops.row_gradients import look_up
from graft.ops.short_conv import ConvState
from graft.shapes import Float, Int


def padded_rows(vocab_size: int, multiple: int) -> int:
    """``vocab_size`` rounded up to a multiple."""
    return math.ceil(vocab_size / multiple) * multiple


class Projection(nn.Module):
    """``y = x Pᵀ + b``: the vectors of a narrow table widened to the stream (ALBERT, 1909.11942, section 3.1).

    Deviation: P starts with standard deviation ``R^(−1/2)``, so that table times projection has the spread that a table
    of full width starts with (ALBERT starts both alike). Always a plain matrix, whatever ``model.linear`` says. Its
    role is "other", not "embedding": unlike the table's rows it is used, and gets a gradient, at every token.

    Args:
        size: channels of the table (R).
        hidden_size: channels out (D).
        bias: add b.
    """

    role: Role = "other"

    def __init__(self, size: int, hidden_size: int, *, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, size))
        self.bias = nn.Parameter(torch.empty(hidden_size)) if bias else None

    def init_parameters(self, rng: Rng) -> None:
        normal_(self.weight, self.weight.shape[1] ** -0.5, rng("weight"))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_BTR: Float[Tensor, "B T R"]) -> Float[Tensor, "B T D"]:
        """In the dtype of x: autocast would otherwise make the whole residual stream a low-precision one."""
        return linear(x_BTR, self.weight, self.bias).to(x_BTR.dtype)


class TokenEmbedding(nn.Module):
    """``P dropout(norm(conv(scale · table[id]) + position vector + type vector))``; each of them as configured.

    The convolution stands where the table's vectors are narrowest and positions do not blur them. State: its last
    K − 1 inputs. Cost: 2·R·D forward FLOPs per position for the projection, 2·K·R² for a full convolution.

    Args:
        config: the model's config.
        num_rows: rows of the table, padding included.

    Attributes:
        kernels: how: "reference" = the plain form of the convolution.
    """

    role: Role = "embedding"
    kernels: Literal["auto", "reference"] = "auto"

    def __init__(self, config: ModelConfig, num_rows: int):
        super().__init__()
        options = config.embedding
        width = options.size or config.hidden_size
        self.scale = {"none": 1.0, "sqrt_hidden_size": config.hidden_size**0.5}.get(str(options.scale), options.scale)
        self.std = config.init.embedding_std or config.init.std
        self.vector_std = config.init.std
        self.weight = nn.Parameter(torch.empty(num_rows, width))
        causal = not config.bidirectional
        self.conv = None if options.conv is None else embedding_conv(options.conv, width, causal=causal)
        position = options.position
        if position is not None and position.acts_in == "embedding":
            self.position = position.build(width, init_std=config.init.std)
        else:  # a position that may act anywhere (none) adds nothing here
            self.position = None
        self.token_type = nn.Parameter(torch.empty(width)) if options.token_type else None
        self.norm = options.norm.build(width) if options.norm is not None else None
        self.dropout = nn.Dropout(options.dropout)
        factorised = options.size is not None
        self.projection = Projection(width, config.hidden_size, bias=options.projection_bias) if factorised else None

    def init_parameters(self, rng: Rng) -> None:
        normal_(self.weight, self.std, rng("weight"))
        if self.token_type is not None:
            normal_(self.token_type, self.vector_std, rng("token_type"))

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> ConvState | None:
        """What the convolution carries before the first token; None without one."""
        return None if self.conv is None else self.conv.empty_state(batch_size, device=device, dtype=dtype)

    def flops_per_token(self) -> int:
        """Forward FLOPs per position in matrix products; the look-up costs none."""
        conv = 0 if self.conv is None else self.conv.flops_per_token()
        return conv + (0 if self.projection is None else 2 * self.projection.weight.numel())

    def forward(
        self,
        ids_BT: Int[Tensor, "B T"],
        positions_BT: Int[Tensor, "#B T"],
        segment_ids_BT: Int[Tensor, "B T"] | None = None,
        state: ConvState | None = None,
    ) -> tuple[Float[Tensor, "B T D"], ConvState | None]:
        """Vectors of the tokens, and the state after the last (None without one before)."""
        x_BTR = look_up(ids_BT, self.weight)
        if self.scale != 1.0:
            x_BTR = x_BTR * self.scale
        if self.conv is not None:
            x_BTR, state = self.conv(x_BTR, segment_ids_BT, state, kernels=self.kernels)
        if self.position is not None:
            x_BTR = x_BTR + self.position(positions_BT)
        if self.token_type is not None:
            x_BTR = x_BTR + self.token_type
        if self.norm is not None:
            x_BTR = self.norm(x_BTR)
        x_BTR = self.dropout(x_BTR)
        return x_BTR if self.projection is None else self.projection(x_BTR), state


class HeadTransform(nn.Module):
    """``norm(act(x Wᵀ + b))`` between the network and the vocabulary's matrix (BERT, 1810.04805).

    W starts with the model's standard deviation. Always a plain matrix, whatever ``model.linear`` says.

    Args:
        config: what is computed.
        hidden_size: channels in (D).
        std: standard deviation of W at the start.
    """

    role: Role = "other"

    def __init__(self, config: HeadTransformConfig, hidden_size: int, *, std: float):
        super().__init__()
        size = config.size or hidden_size
        self.std = std
        self.weight = nn.Parameter(torch.empty(size, hidden_size))
        self.bias = nn.Parameter(torch.empty(size)) if config.bias else None
        self.activation = ACTIVATIONS[config.activation]
        self.norm = None if config.norm is None else config.norm.build(size)

    def init_parameters(self, rng: Rng) -> None:
        normal_(self.weight, self.std, rng("weight"))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T size"]:
        y = self.activation(linear(x_BTD, self.weight, self.bias))
        return y if self.norm is None else self.norm(y)


class Head(nn.Module):
    """``logits = softcap(h Wᵀ + b)`` in fp32, over the vocabulary alone; h as `features` makes it of x.

    W is the head's own matrix, or the embedding table when tied. To a table narrower than h it is tied through the
    transposed projection P of the embedding: ``(h P) Wᵀ``, so that ``W Pᵀ``, as large as a table of full width, is
    never formed. The rows that pad the vocabulary take part in the product, because matrix units like round sizes, and
    are cut off at once: they are never predicted and their gradient is zero. The soft cap is ``c·tanh(z/c)`` (Gemma 2,
    2408.00118).

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
        transform, D = options.transform, config.hidden_size
        self.transform = None if transform is None else HeadTransform(transform, D, std=config.init.std)
        self.width = D if self.transform is None else self.transform.weight.shape[0]
        tied = options.tie_word_embeddings
        self.weight = None if tied else nn.Parameter(torch.empty(num_rows, self.width))
        self.bias = nn.Parameter(torch.empty(num_rows)) if options.bias else None

    def init_parameters(self, rng: Rng) -> None:
        if self.weight is not None:
            normal_(self.weight, self.std, rng("weight"))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def features(
        self, x_BTD: Float[Tensor, "B T D"], projection_DR: Float[Tensor, "D R"] | None
    ) -> Float[Tensor, "B T R"]:
        """What meets W: x, transformed if configured, and taken to the table's width by ``projection_DR`` if given."""
        x_BTD = x_BTD if self.transform is None else self.transform(x_BTD)
        return x_BTD if projection_DR is None else x_BTD @ projection_DR

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        table_VR: Float[Tensor, "rows R"],
        projection_DR: Float[Tensor, "D R"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        logits_BTV = linear(self.features(x_BTD, projection_DR), table_VR, self.bias)[..., : self.vocab_size]
        logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        return logits_BTV if self.softcap is None else soft_cap(logits_BTV, self.softcap)
