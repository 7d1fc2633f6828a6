"""Being asked to stop: the first SIGTERM or SIGINT is a request, the second is an order."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While active, remembers a stop signal instead of dying of it: the loop finishes its step, saves and leaves.

    A second signal raises KeyboardInterrupt wherever the program is (not an `Exception`, so nothing that guards
    against ordinary failures swallows it). An interrupted save leaves the previous checkpoint as it was.
    Python delivers signals to the main thread only; used in another thread this changes no handler.

    Attributes:
        reason: name of the signal that asked to stop; None while none has.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None:
            raise KeyboardInterrupt(f"second signal: {signal.Signals(number).name}")
        self.reason = signal.Signals(number).name

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not set from Python
        self._previous.clear()
