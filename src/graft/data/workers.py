"""What a process that prepares batches does. No torch: a worker that starts afresh is ready at once."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np

from graft.data.packing.base import Packing, Rows
from graft.faults import fault_point


def flat_rows(packing: Packing, first: int, count: int) -> Rows:
    """``count`` rows from row ``first`` of the endless sequence of epochs."""
    pieces: list[Rows] = []
    while count:
        epoch, index = divmod(first, packing.num_rows)
        taken = min(count, packing.num_rows - index)
        pieces.append(packing.rows(epoch, np.arange(index, index + taken)))
        first, count = first + taken, count - taken
    if len(pieces) == 1:
        return pieces[0]
    joined = (None if parts[0] is None else np.concatenate(parts) for parts in zip(*pieces, strict=True))
    return Rows(*joined)  # pyright: ignore[reportArgumentType]


class _Worker:
    """The packing of this worker process."""

    packing: Packing | None = None


def start_worker(packing: Packing) -> None:
    """First thing in a worker: keeps the packing, leaves signals to the training process, ends when that is gone."""
    _Worker.packing = packing
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


def worker_rows(first: int, count: int) -> Rows:
    """`flat_rows` in a worker."""
    fault_point("data.worker", first // count)
    assert _Worker.packing is not None
    return flat_rows(_Worker.packing, first, count)
