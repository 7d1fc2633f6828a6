"""Counting the bytes alive while code runs, without allocating them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graft.ops.row_gradients import split_rows


def stored(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors with storage that make up ``tensor``."""
    return split_rows(tensor) if tensor.is_sparse else (tensor,)


class Allocator(Protocol):
    """Is told of every storage that is made and freed."""

    def allocate(self, key: int, size: int) -> None:
        """A storage of ``size`` bytes is made."""
        ...

    def release(self, key: int) -> None:
        """The storage ``key`` is freed."""
        ...


class LiveBytes(TorchDispatchMode):
    """While active, every storage an operation makes is counted until it is freed.

    Works on real tensors and on fake ones (which hold shapes but no memory), because both free their storages at the
    same moments. Memory inside an operation (scratch of a kernel) is not seen.

    Args:
        allocator: follows the same events; None = nobody.

    Attributes:
        live: bytes alive now.
        peak: most bytes alive at once so far.
        window_peak: the same since `open_window`.
    """

    def __init__(self, allocator: Allocator | None = None) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.window_peak = 0
        self._allocator = allocator
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def open_window(self) -> int:
        """Starts `window_peak` afresh; returns the bytes alive now."""
        self.window_peak = self.live
        return self.live

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs the operation and counts the storages of its results that are new."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                for tensor in stored(leaf):
                    self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def freed(_: weakref.ref[torch.UntypedStorage]) -> None:
            self._known.pop(key, None)
            self.live -= size
            if self._allocator is not None:
                self._allocator.release(key)

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.window_peak = max(self.window_peak, self.live)
        if self._allocator is not None:
            self._allocator.allocate(key, size)
