"""The two ends of the network as data: token ids to vectors, vectors to logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from graft.config.base import SET, Config, Problem, knob
from graft.config.families import Norm, Position


class EmbeddingConvConfig(Config):
    """A convolution over the table's vectors of neighbouring tokens, never across a document's border."""

    kernel_size: int = knob(
        3,
        "tokens a token sees, itself included (taps); in a decoder all others come before it, in an encoder half on "
        "each side, and an even number reaches one further back than ahead",
        ge=2,
    )
    depthwise: bool = knob(False, "one kernel per channel, instead of one from every channel to every other")
    bias: bool = knob(True, "bias on the convolution")


class EmbeddingConfig(Config):
    """Token ids to vectors, in this order: table, scale, conv, position and token type, norm, dropout, projection."""

    size: int | None = knob(
        None,
        "channels of the table and of everything before the projection to hidden_size (ALBERT, 1909.11942); null = "
        "hidden_size, and no projection",
        ge=1,
    )
    projection_bias: bool = knob(False, "bias on the projection (ALBERT)", only_if={"size": SET})
    scale: Literal["none", "sqrt_hidden_size"] | float = knob(
        "none", "factor on the table's vectors; sqrt_hidden_size is Gemma's"
    )
    conv: EmbeddingConvConfig | None = knob(None, "convolution over neighbouring tokens; null = none")
    position: Position | None = knob(None, "position vectors added to the embeddings, e.g. {type: learned}")
    token_type: bool = knob(
        False, "add one learned vector to every token: BERT's embedding of token type 0, the only type there is here"
    )
    norm: Norm | None = knob(None, "norm on the sum of all that (BERT); null = none")
    dropout: float = knob(0.0, "dropout rate after the norm, in [0, 1)", ge=0.0, lt=1.0)

    def problems(self) -> Iterator[Problem]:
        if self.position is not None and self.position.acts_in == "attention":
            message = f"{self.position.tag} acts inside attention, not on embeddings"
            yield Problem(("position",), message, "set it on the attention part")

    def problems_in(self, hidden_size: int) -> Iterator[Problem]:
        """Problems that depend on the width of the stream (D)."""
        if self.size == hidden_size:
            yield Problem(
                ("size",),
                f"a table of hidden_size = {hidden_size} channels needs no projection",
                "leave size out, or make it smaller",
            )


class HeadTransformConfig(Config):
    """What happens to the features before they meet the vocabulary: ``norm(act(x Wᵀ + b))`` (BERT, 1810.04805)."""

    size: int | None = knob(None, "channels out; null = hidden_size, ALBERT has the table's", ge=1)
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = knob("gelu", "nonlinearity (BERT's is gelu)")
    norm: Norm | None = knob(None, "norm after it (layer_norm in BERT); null = none")
    bias: bool = knob(True, "bias on the matrix")


class HeadConfig(Config):
    """Vectors to logits."""

    transform: HeadTransformConfig | None = knob(None, "a layer before the vocabulary's matrix (BERT); null = none")
    tie_word_embeddings: bool = knob(
        True, "the head's matrix is the embedding table, behind the transposed projection if the table is narrower"
    )
    logit_softcap: float | None = knob(
        None, "logits become c·tanh(logits/c) (Gemma 2, 2408.00118); null = none", gt=0.0
    )
    bias: bool = knob(False, "add a learned bias to the logits")
    pad_vocab_to_multiple_of: int = knob(
        1, "round the table's rows up to a multiple (64 suits matrix units); padded rows are never predicted", ge=1
    )

    def problems_with(self, embedding: EmbeddingConfig, hidden_size: int) -> Iterator[Problem]:
        """Problems that depend on the table and on the width of the stream (D)."""
        if self.transform is None or not self.tie_word_embeddings:
            return
        fitting = {hidden_size, embedding.size or hidden_size}
        if (self.transform.size or hidden_size) not in fitting:
            widths = " or ".join(str(width) for width in sorted(fitting))
            yield Problem(
                ("transform", "size"),
                f"{self.transform.size} channels do not fit a tied table, which takes {widths}",
                "change size, or set tie_word_embeddings: false",
            )
