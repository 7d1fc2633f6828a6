"""What is in prepared data, as plain numbers and text for a person."""

from __future__ import annotations

from typing import Any

import numpy as np

from graft.config.experiment import Experiment
from graft.data.loader import make_packing
from graft.data.packing.base import Packing
from graft.data.prepare import PreparedData
from graft.data.store import TokenStore
from graft.data.tokenizers.base import Tokenizer

BORDER = "⏎doc⏎"
"""Stands for an end-of-document id in a decoded row."""


def describe(prepared: PreparedData, experiment: Experiment) -> dict[str, Any]:
    """Counts, sizes and places: what ``graft data build`` reports."""
    return {
        "fingerprint": prepared.fingerprint,
        "folder": prepared.report["folder"],
        "vocab_size": prepared.vocab_size,
        "seq_len": experiment.data.seq_len,
        "skipped": prepared.report["skipped"],
        "first_skipped": prepared.report["first_skipped"],
        "train": _side(prepared, experiment, "train"),
        "validation": _side(prepared, experiment, "validation"),
        "warnings": list(prepared.warnings),
    }


def inspect(prepared: PreparedData, experiment: Experiment, *, samples: int = 2) -> dict[str, Any]:
    """`describe`, and lengths, shards and decoded training rows: what ``graft data inspect`` reports."""
    found = describe(prepared, experiment)
    packing = make_packing(experiment, prepared.train, seed=experiment.seed)
    for side, store in ("train", prepared.train), ("validation", prepared.validation):
        found[side]["lengths"] = length_histogram(store)
        found[side]["shards"] = [
            {"file": str(store.folder / s.file), "tokens": s.tokens, "hash": s.hash} for s in store.shards
        ]
    found["samples"] = [decoded_row(packing, prepared.tokenizer, i) for i in range(min(samples, packing.num_rows))]
    return found


def _side(prepared: PreparedData, experiment: Experiment, side: str) -> dict[str, Any]:
    store: TokenStore = getattr(prepared, side)
    packing = make_packing(experiment, store, seed=experiment.seed)
    counts = {name: prepared.report[side][name] for name in ("documents", "tokens", "bytes", "bytes_per_token")}
    return {**counts, "rows": packing.num_rows, "packing_efficiency": packing.efficiency}


def length_histogram(store: TokenStore) -> list[dict[str, int]]:
    """Documents by length in tokens (end-of-document id included), in ranges that double; none left out between."""
    lengths = store.lengths
    powers = np.ceil(np.log2(lengths)).astype(np.int64)  # a length in (2^(k-1), 2^k] counts for k
    counts = np.bincount(powers)
    first = int(powers.min())
    return [
        {"from": 2 ** (k - 1) + 1 if k else 1, "to": 2**k, "documents": int(counts[k])}
        for k in range(first, len(counts))
    ]


def decoded_row(packing: Packing, tokenizer: Tokenizer, index: int) -> str:
    """Row ``index`` of epoch 0 as text, with `BORDER` wherever a document begins; padding is left out."""
    rows = packing.rows(0, np.array([index]))
    ids = rows.input_ids[0] if rows.segment_ids is None else rows.input_ids[0][rows.segment_ids[0] > 0]
    pieces = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_document))
    return BORDER.join(tokenizer.decode(piece.tolist()) for piece in pieces)
