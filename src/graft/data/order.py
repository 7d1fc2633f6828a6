"""Shuffles that are pure functions of numbers: the same on every machine and with every version of numpy."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def number_of(*key: int | str) -> int:
    """64 bits that depend on every part of ``key``."""
    text = "/".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permutation(n: int, *key: int | str) -> NDArray[np.int64]:
    """The numbers 0 … n-1, shuffled by ``key``.

    Each number is given a 64-bit key by SplitMix64 (Fast Splittable Pseudorandom Number Generators, Steele et al. 2014)
    and the numbers are sorted by it; equal keys keep their order.
    """
    with np.errstate(over="ignore"):
        z = np.uint64(number_of(*key)) + _GOLDEN * np.arange(1, n + 1, dtype=np.uint64)
        z = (z ^ (z >> np.uint64(30))) * _MIX[0]
        z = (z ^ (z >> np.uint64(27))) * _MIX[1]
        z ^= z >> np.uint64(31)
    return np.argsort(z, kind="stable")
