"""Byte n-gram baselines: what counting alone reaches, to be read beside a model's bits per byte.

Interpolated Witten–Bell smoothing (Witten & Bell 1991; Chen & Goodman 1998, section 2.4): with c(h, w) the count of
byte w after context h, c(h) its sum and t(h) the number of different bytes seen after h,

    P_n(w | h) = (c(h, w) + t(h) · P_{n−1}(w | h')) / (c(h) + t(h)),

h' being h without its first byte, down to the uniform distribution over 256 bytes. Contexts at the start of a document
are as short as the document so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from graft.errors import DataError

MAX_ORDER = 7  # context and byte are packed into one int64


@dataclass(frozen=True)
class _Level:
    """Counts of one order: sorted n-gram keys with counts, sorted context keys with totals and distinct followers."""

    grams: np.ndarray
    gram_counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    distinct: np.ndarray


def _keys(data: np.ndarray, order: int) -> np.ndarray:
    """[L] bytes -> [L − order + 1] int64, each n-gram packed big-endian (its context is the key shifted right by 8)."""
    count = len(data) - order + 1
    keys = np.zeros(max(count, 0), dtype=np.int64)
    for i in range(order):
        keys = (keys << 8) | data[i : i + len(keys)]
    return keys


def _level(documents: list[np.ndarray], order: int) -> _Level:
    grams, counts = np.unique(np.concatenate([_keys(d, order) for d in documents]), return_counts=True)
    contexts, starts = np.unique(grams >> 8, return_index=True)
    ends = np.append(starts[1:], len(grams))
    totals = np.add.reduceat(counts, starts)
    return _Level(grams, counts, contexts, totals, ends - starts)


def _lookup(sorted_keys: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """``values`` at ``keys``, 0 where a key is unknown."""
    at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.where(sorted_keys[at] == keys, values[at], 0)


def _bits(levels: list[_Level], data: np.ndarray) -> float:
    """Bits the model spends on one document."""
    probability = np.full(len(data), 1 / 256)
    for order, level in enumerate(levels, start=1):
        if len(data) < order:
            break
        keys = _keys(data, order)
        count = _lookup(level.grams, level.gram_counts, keys)
        total = _lookup(level.contexts, level.totals, keys >> 8)
        distinct = _lookup(level.contexts, level.distinct, keys >> 8)
        lower = probability[order - 1 :]
        seen = total > 0
        probability[order - 1 :] = np.where(seen, (count + distinct * lower) / np.maximum(total + distinct, 1), lower)
    return float(-np.log2(probability).sum())


def ngram_bits_per_byte(train: Iterable[bytes], held_out: Iterable[bytes], order: int) -> float:
    """Bits per byte of held-out documents under an interpolated byte n-gram model of the training documents.

    Args:
        train: training documents, UTF-8.
        held_out: documents to score, each on its own.
        order: n; 1 is the unigram, 5 looks at four bytes of context.

    Raises:
        DataError: either side has no bytes.
    """
    assert 1 <= order <= MAX_ORDER, order
    documents = [np.frombuffer(d, dtype=np.uint8).astype(np.int64) for d in train]
    scored = [np.frombuffer(d, dtype=np.uint8).astype(np.int64) for d in held_out]
    num_bytes = sum(len(d) for d in scored)
    if not num_bytes or not any(len(d) for d in documents):
        raise DataError("an n-gram baseline needs text on both sides", expected="at least one byte each")
    levels = [_level(documents, n) for n in range(1, order + 1) if any(len(d) >= n for d in documents)]
    bits = math.fsum(_bits(levels, d) for d in scored if len(d))
    return bits / num_bytes
