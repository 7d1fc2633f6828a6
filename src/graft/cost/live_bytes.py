"""Counting the bytes alive while code runs, without allocating them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While active, every storage an operation makes is counted until it is freed.

    Works on real tensors and on fake ones (which hold shapes but no memory), because both free their storages at the
    same moments. Memory inside an operation (scratch of a kernel) is not seen.

    Attributes:
        live: bytes alive now.
        peak: most bytes alive at once so far; may be reset to ``live``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

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
                self._count(leaf.untyped_storage())
        return out

    def ignore(self, tensor: torch.Tensor) -> None:
        """Leaves a tensor that exists already out of the count (operations in place return it)."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._known[key] = weakref.ref(storage, lambda _: self._known.pop(key, None))

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def freed(_: weakref.ref[torch.UntypedStorage]) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
