"""What counting reaches on the very text a run is scored on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from graft.config.experiment import Experiment
from graft.data.loader import validation_batches
from graft.data.prepare import PreparedData, prepare
from graft.data.tokenizers.base import Tokenizer
from graft.errors import GraftError
from graft.evals.ngram import ngram_bits_per_byte

FILE = "baselines.json"
ORDERS = {"unigram": 1, "5-gram": 5}
"""Name -> order of the byte n-grams a run is compared with."""


def _texts(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[bytes]:
    """The documents in a row of ids, cut where they end."""
    row = np.asarray(list(ids))
    for piece in np.split(row, np.flatnonzero(row == tokenizer.end_of_document)):
        text = tokenizer.decode([int(i) for i in piece if i != tokenizer.end_of_document])
        if text:
            yield text.encode()


def _train_texts(prepared: PreparedData) -> Iterator[bytes]:
    for i in range(prepared.train.num_documents):
        yield from _texts(prepared.train.document(i).tolist(), prepared.tokenizer)


def _held_out_texts(prepared: PreparedData, experiment: Experiment) -> Iterator[bytes]:
    """The text of exactly the targets that the run's held-out loss is taken over, row by row as the model sees them."""
    for batch in validation_batches(prepared, experiment):
        for targets, known in zip(batch.targets_BT, batch.targets_BT >= 0, strict=True):
            yield from _texts(targets[known].tolist(), prepared.tokenizer)


def measure_baselines(experiment: Experiment) -> dict[str, float]:
    """Bits per byte of byte n-grams counted on the training text, on the held-out rows a run is evaluated on.

    Rows are scored as the model scores them: each on its own, from its first byte.

    Returns:
        ``unigram`` and ``5-gram`` (see `ORDERS`).

    Raises:
        DataError: as preparing the data may.
    """
    prepared = prepare(experiment)
    train = list(_train_texts(prepared))
    held_out = list(_held_out_texts(prepared, experiment))
    return {name: ngram_bits_per_byte(train, held_out, order) for name, order in ORDERS.items()}


def baselines_of(run_dir: Path, experiment: Experiment) -> dict[str, float]:
    """The baselines of a run, kept in its directory; empty when its data is gone."""
    path = run_dir / FILE
    if path.exists():
        return json.loads(path.read_text())
    try:
        measured = measure_baselines(experiment)
    except GraftError:
        return {}
    path.write_text(json.dumps(measured, indent=1) + "\n")
    return measured
