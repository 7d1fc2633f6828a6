"""The batches of a run: training steps in an order that can be resumed, and a fixed held-out set."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graft.config.experiment import Experiment
from graft.data.batch import Batch
from graft.data.packing.base import IGNORED_TARGET, Packing, Rows
from graft.data.packing.concat_config import ConcatPackingConfig
from graft.data.prepare import PreparedData
from graft.data.store import TokenStore
from graft.data.workers import flat_rows, start_worker, worker_rows
from graft.errors import CheckpointError, DataError

STEPS_AHEAD = 2
"""Steps each worker prepares in advance."""

VALIDATION_SEED = 0
"""Held-out rows do not depend on the run's seed, so that runs of different seeds can be compared."""


def make_packing(experiment: Experiment, store: TokenStore, *, seed: int) -> Packing:
    """The configured packing over ``store`` (null = concat)."""
    config = experiment.data.packing or ConcatPackingConfig()
    return config.build(store, seq_len=experiment.data.seq_len, seed=seed)


class TrainLoader:
    """Hands out one optimizer update's micro-batches at a time, for ever: epoch follows epoch.

    The k-th row of a run depends on (seed, k) alone: not on workers, on the micro-batch size, or on where the run was
    interrupted. A step takes the next ``global_batch_size`` rows, across the end of an epoch if need be.

    With ``runtime.data_workers`` > 0, processes prepare the next steps; one that dies is an error at the next step.

    Args:
        prepared: the tokens.
        experiment: seed, lengths, batch sizes and workers are read.
    """

    def __init__(self, prepared: PreparedData, experiment: Experiment):
        self.packing = make_packing(experiment, prepared.train, seed=experiment.seed)
        self.token_bytes = prepared.tokenizer.token_bytes()
        self.global_batch_size = experiment.training.global_batch_size
        self.micro_batch_size = experiment.micro_batch_size
        self._next_row = 0
        self._ahead: deque[tuple[int, Future[Rows]]] = deque()
        self._workers = experiment.runtime.data_workers
        self._pool: ProcessPoolExecutor | None = None

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch."""
        return self.packing.num_rows

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next optimizer update.

        Raises:
            DataError: a worker died or failed.
        """
        first, size = self._next_row, self.micro_batch_size
        rows = self._rows(first) if self._workers == 0 else self._rows_of_workers(first)
        self._next_row = first + self.global_batch_size
        return [
            make_batch(_part(rows, start, start + size), self.token_bytes, range(first + start, first + start + size))
            for start in range(0, self.global_batch_size, size)
        ]

    def _rows(self, first: int) -> Rows:
        return flat_rows(self.packing, first, self.global_batch_size)

    def _rows_of_workers(self, first: int) -> Rows:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._workers,
                mp_context=get_context("spawn"),  # a fork would copy threads' locks and the accelerator's state
                initializer=start_worker,
                initargs=(self.packing,),
            )
        try:
            while len(self._ahead) < self._workers * STEPS_AHEAD:
                start = self._ahead[-1][0] + self.global_batch_size if self._ahead else first
                self._ahead.append((start, self._pool.submit(worker_rows, start, self.global_batch_size)))
            start, future = self._ahead.popleft()
            assert start == first, "the steps prepared ahead follow the cursor"
            return future.result()
        except BrokenProcessPool as error:
            self.close()
            raise DataError(
                "a process that prepares batches died (killed, or out of memory)",
                where="runtime.data_workers",
                fix="resume the run, or set runtime.data_workers=0 (a script of your own needs "
                "`if __name__ == '__main__':` around what it does to have workers)",
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Where the next step begins: epoch, and index of the row within it."""
        epoch, index = divmod(self._next_row, self.packing.num_rows)
        return {"epoch": epoch, "index": index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues exactly after the step whose `state_dict` this is.

        Raises:
            CheckpointError: the state is none of these rows.
        """
        epoch, index = state.get("epoch"), state.get("index")
        rows = self.packing.num_rows
        if not (isinstance(epoch, int) and isinstance(index, int) and epoch >= 0 and 0 <= index < rows):
            raise CheckpointError(
                f"the data position {state} does not exist",
                expected=f"epoch >= 0 and index below the {rows} rows of an epoch",
                fix="resume with the data and seq_len the run was started with",
            )
        self._next_row = epoch * rows + index
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def close(self) -> None:
        """Ends the worker processes. The loader can be used again afterwards."""
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def validation_batches(prepared: PreparedData, experiment: Experiment) -> Iterator[Batch]:
    """The same held-out rows every time: the first ``evaluation.max_sequences`` of a fixed shuffle (seed 0).

    All batches have the same shape: the last is filled up with rows whose targets are all ignored.
    """
    packing = make_packing(experiment, prepared.validation, seed=VALIDATION_SEED)
    count = min(packing.num_rows, experiment.evaluation.max_sequences)
    size = min(count, experiment.evaluation.batch_size or experiment.micro_batch_size)
    token_bytes = prepared.tokenizer.token_bytes()
    for first in range(0, count, size):
        indices = np.arange(first, first + size)
        rows = packing.rows(0, indices % count)
        rows.targets[indices >= count] = IGNORED_TARGET
        yield make_batch(rows, token_bytes, indices.tolist())


def make_batch(rows: Rows, token_bytes: NDArray[np.int32], sample_ids: Any) -> Batch:
    """Rows as tensors, with their targets and bytes counted."""
    predicted = rows.targets[rows.targets != IGNORED_TARGET]

    def tensor(array: NDArray[np.int64] | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(np.ascontiguousarray(array))

    inputs, targets = tensor(rows.input_ids), tensor(rows.targets)
    assert inputs is not None
    assert targets is not None
    return Batch(
        input_ids_BT=inputs,
        targets_BT=targets,
        segment_ids_BT=tensor(rows.segment_ids),
        positions_BT=tensor(rows.positions),
        num_targets=len(predicted),
        num_bytes=int(token_bytes[predicted].sum(dtype=np.int64)),
        sample_ids=tuple(sample_ids),
    )


def _part(rows: Rows, start: int, stop: int) -> Rows:
    return Rows(*(None if array is None else array[start:stop] for array in rows))  # pyright: ignore[reportArgumentType]
