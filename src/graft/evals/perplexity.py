"""Loss of any text under a model: sliding windows, documents apart, sums with known denominators."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from graft.config.advice import marks
from graft.data.batch import IGNORED_TARGET, Batch
from graft.errors import ConfigError, DataError
from graft.model import Model
from graft.objectives.base import Objective

_SORTED_TOGETHER = 16
"""Batches whose rows are sorted by length before they are cut: short documents then share one, with little padding."""


@dataclass(frozen=True)
class TokenDocument:
    """A document to be scored.

    Args:
        token_ids: its ids, without the end-of-document ids around it.
        num_bytes: UTF-8 bytes of its text.
        num_characters: characters of its text.
    """

    token_ids: NDArray[np.integer]
    num_bytes: int
    num_characters: int


@dataclass(frozen=True)
class TextLoss:
    """Cross-entropy of a text, with what it may be divided by.

    The end of each document is predicted and scored like a token, as in training; it has no bytes and no characters.

    Args:
        loss_sum: nats over all scored tokens.
        num_tokens: scored tokens, document ends included.
        num_documents: documents.
        num_bytes: UTF-8 bytes of the text.
        num_characters: characters of the text.
        marks: what is true of all these numbers (`graft.config.advice.marks`).
    """

    loss_sum: float
    num_tokens: int
    num_documents: int
    num_bytes: int
    num_characters: int
    marks: Mapping[str, bool] = field(default_factory=dict[str, bool])

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.loss_sum / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that exceeds a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte: comparable between tokenizers."""
        return self.loss_sum / math.log(2) / self.num_bytes

    @property
    def bits_per_character(self) -> float:
        """Bits per character (code point)."""
        return self.loss_sum / math.log(2) / self.num_characters

    def to_dict(self) -> dict[str, float]:
        """Every number by name, behind the marks."""
        return {
            **self.marks,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "bits_per_character": self.bits_per_character,
            "loss_sum": self.loss_sum,
            "tokens": self.num_tokens,
            "documents": self.num_documents,
            "bytes": self.num_bytes,
            "characters": self.num_characters,
        }


@dataclass(frozen=True)
class Window:
    """Positions [start, stop) of a document are read, the predictions of [first_scored, stop) count."""

    start: int
    stop: int
    first_scored: int


def windows(length: int, context: int, stride: int) -> Iterator[Window]:
    """Cuts ``length`` positions into windows of up to ``context`` that move by ``stride``.

    Every position is scored exactly once. In the first window all are; after it each position sees at least
    ``context - stride`` positions before itself (stride 1: always a full window, stride = context: disjoint blocks).
    """
    start, scored = 0, 0
    while scored < length:
        stop = min(start + context, length)
        yield Window(start, stop, scored)
        start, scored = start + stride, stop


@dataclass(frozen=True)
class _Row:
    input_ids: NDArray[np.int64]
    targets: NDArray[np.int64]


def _rows(document: TokenDocument, end_of_document: int, context: int, stride: int) -> Iterator[_Row]:
    ids = np.concatenate([[end_of_document], document.token_ids, [end_of_document]]).astype(np.int64)
    for window in windows(len(ids) - 1, context, stride):
        targets = ids[window.start + 1 : window.stop + 1].copy()
        targets[: window.first_scored - window.start] = IGNORED_TARGET
        yield _Row(ids[window.start : window.stop], targets)


def _batch(rows: list[_Row]) -> Batch:
    longest = max(len(row.input_ids) for row in rows)
    inputs = np.zeros((len(rows), longest), dtype=np.int64)
    targets = np.full((len(rows), longest), IGNORED_TARGET, dtype=np.int64)
    segments = np.zeros((len(rows), longest), dtype=np.int64)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        inputs[i, :length], targets[i, :length], segments[i, :length] = row.input_ids, row.targets, 1
    return Batch(
        input_ids_BT=torch.from_numpy(inputs),
        targets_BT=torch.from_numpy(targets),
        segment_ids_BT=None if segments.all() else torch.from_numpy(segments),
        positions_BT=None,
        num_targets=int((targets != IGNORED_TARGET).sum()),
        num_bytes=0,
        sample_ids=(),
    )


def _batches(rows: Iterator[_Row], batch_size: int) -> Iterator[Batch]:
    while buffer := list(itertools.islice(rows, batch_size * _SORTED_TOGETHER)):
        buffer.sort(key=lambda row: -len(row.input_ids))
        for i in range(0, len(buffer), batch_size):
            yield _batch(buffer[i : i + batch_size])


class _Counted:
    """Passes documents on and counts them: the scoring stays a stream."""

    def __init__(self, documents: Iterable[TokenDocument]):
        self.documents = documents
        self.count = self.num_bytes = self.num_characters = 0

    def __iter__(self) -> Iterator[TokenDocument]:
        for document in self.documents:
            self.count += 1
            self.num_bytes += document.num_bytes
            self.num_characters += document.num_characters
            yield document


def text_loss(
    model: Model,
    objective: Objective,
    documents: Iterable[TokenDocument],
    *,
    end_of_document: int,
    context: int,
    stride: int,
    batch_size: int = 8,
) -> TextLoss:
    """The cross-entropy of ``documents``, each read on its own from its end-of-document id.

    Documents longer than ``context`` are read in overlapping windows (`windows`). Memory is bounded by
    ``batch_size · context`` positions, however long the text is. Auxiliary terms never enter.

    Args:
        model: the model; it is evaluated without dropout, in the caller's autocast context.
        objective: reports the metric ``ce``, a sum over targets.
        documents: what to score; consumed once, as a stream.
        end_of_document: id in front of and behind each document.
        context: positions a window reads.
        stride: positions it moves by, at most ``context``.
        batch_size: windows per forward pass.

    Raises:
        ConfigError: ``stride`` is not in 1 … ``context``.
        DataError: there is no document, or no byte of text.
    """
    if not 1 <= stride <= context:
        raise ConfigError(f"stride {stride} with context {context}", expected=f"a stride of 1 to {context}")
    device = next(model.parameters()).device
    counted = _Counted(documents)
    rows = (row for document in counted for row in _rows(document, end_of_document, context, stride))
    loss_sum, num_tokens = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in _batches(rows, batch_size):
                loss_sum += objective.loss(model, batch.to(device)).metrics["ce"].item()
                num_tokens += batch.num_targets
    finally:
        model.train(was_training)
    if counted.num_bytes == 0:
        raise DataError("there is no text to score", fix="give a file with text in it")
    counts = num_tokens, counted.count, counted.num_bytes, counted.num_characters
    return TextLoss(loss_sum, *counts, marks=marks(model.config))
