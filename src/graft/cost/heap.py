"""What the C library's heap needs beyond the bytes that are alive: a model of glibc's malloc."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass

ALIGNMENT = 64
"""PyTorch asks for tensors at multiples of this many bytes (posix_memalign)."""
HEADER = 16
"""glibc keeps a chunk's size in front of it and rounds sizes to this."""
SMALLEST_CHUNK = 32
SLACK = ALIGNMENT + SMALLEST_CHUNK
"""An aligned request looks for this much more than its size, so a hole left by an equal tensor is too small."""
SMALL = 1024
"""Requests below this live in glibc's bins of small chunks; they cost next to nothing and are left out."""
HELD = 50
"""How many alignment remainders are taken by small objects at a time after their tensor is gone. The one number here
that was fitted, to the resident memory of a few training runs (fp32 and bf16, with and without recomputation); such
runs vary among themselves by more than the model is off."""


@dataclass(frozen=True)
class _Block:
    address: int
    size: int
    leader: tuple[int, int] | None


class GlibcHeap:
    """Best fit over one growing heap, with neighbouring holes merged, as glibc's ``malloc`` does for large requests.

    Large tensors come from the heap, not from mappings of their own: glibc raises its mapping threshold to the largest
    block that was freed, and graft's allocator settings turn mappings off. Freed memory stays resident.

    The waste comes from alignment. A chunk that does not start at a multiple of 64 is split, and the leading remainder
    goes to glibc's cache of small chunks, where small objects take it. While one does, the holes beside it cannot
    merge, and a hole of exactly the size asked for is `SLACK` bytes too small. The model keeps the last `HELD`
    remainders in use.

    Attributes:
        peak: the heap's largest extent, in bytes.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._top = 0
        self._holes: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []
        self._blocks: dict[int, _Block] = {}
        self._held: deque[tuple[int, int]] = deque()

    def allocate(self, key: int, size: int) -> None:
        """Places a block of ``size`` bytes; `release` it by ``key``."""
        if size < SMALL:
            return
        size = -(-(size + HEADER // 2) // HEADER) * HEADER
        start, room = self._take(size + SLACK)
        offset = -(start + HEADER) % ALIGNMENT
        if 0 < offset < SMALLEST_CHUNK:
            offset += ALIGNMENT
        rest = room - offset - size
        if rest >= SMALLEST_CHUNK:
            self._give(start + offset + size, rest)
        else:
            size += rest
        self._blocks[key] = _Block(start + offset, size, (start, offset) if offset else None)

    def release(self, key: int) -> None:
        """Frees a block."""
        block = self._blocks.pop(key, None)
        if block is None:
            return
        self._give(block.address, block.size)
        if block.leader is not None:
            self._held.append(block.leader)
            if len(self._held) > HELD:
                self._give(*self._held.popleft())

    def _take(self, size: int) -> tuple[int, int]:
        """The smallest hole of at least ``size`` bytes, as (address, size); new memory when there is none."""
        index = bisect_left(self._by_size, (size, 0))
        if index < len(self._by_size):
            room, address = self._by_size[index]
            self._remove(address)
            return address, room
        address = self._top
        self._top += size
        self.peak = max(self.peak, self._top)
        return address, size

    def _give(self, address: int, size: int) -> None:
        """Makes a hole, merged with the holes beside it and with the unused top."""
        if address + size in self._holes:
            size += self._remove(address + size)
        if address in self._ends:
            before = self._ends[address]
            size += self._remove(before)
            address = before
        if address + size == self._top:
            self._top = address
            return
        self._holes[address] = size
        self._ends[address + size] = address
        insort(self._by_size, (size, address))

    def _remove(self, address: int) -> int:
        size = self._holes.pop(address)
        del self._ends[address + size]
        del self._by_size[bisect_left(self._by_size, (size, address))]
        return size
