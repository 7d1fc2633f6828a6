"""What may be wrong with the heads of a token mixer, and with the position they get."""

from __future__ import annotations

from collections.abc import Iterator

from graft.config.base import Problem
from graft.config.families import PositionConfig


def head_problems(
    hidden_size: int, num_heads: int, head_dim: int | None, position: PositionConfig
) -> Iterator[Problem]:
    """Heads that do not divide the stream, or whose channels (H) do not suit the position.

    Args:
        hidden_size: width of the stream (D).
        num_heads: heads (N).
        head_dim: channels of a head; None = D / N.
        position: the field ``position`` of the mixer.
    """
    if head_dim is None and hidden_size % num_heads:
        yield Problem(
            ("num_heads",),
            f"num_heads {num_heads} does not divide hidden_size {hidden_size}",
            "set head_dim, or another number of heads",
        )
        return
    for problem in position.problems_with(head_dim or hidden_size // num_heads):
        yield Problem(("position", *problem.path), problem.message, problem.fix)


def embedding_position_problems(position: PositionConfig) -> Iterator[Problem]:
    """A position in attention that acts on embeddings alone."""
    if position.acts_in == "embedding":
        yield Problem(("position",), f"{position.tag} acts on embeddings", "set model.embedding.position instead")
