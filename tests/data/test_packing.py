"""Rows: every target once, segments and positions as the documents lie, best fit as defined."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from graft.data.order import permutation
from graft.data.packing.base import Packing, Rows
from graft.data.packing.best_fit import best_fit
from graft.data.packing.best_fit_config import BestFitPackingConfig
from graft.data.packing.concat_config import ConcatPackingConfig
from graft.data.store import TokenStore
from tiny_data import make_store

LENGTHS = st.lists(st.integers(0, 23), min_size=2, max_size=14)
GOLDEN = [0, 1, 5, 4, 2, 7, 6, 3]
"""permutation(8, 0, 0, "rows"): runs must find their data order again with every version of numpy."""

SLOW_SETUP = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)


def numbered_store(tmp_path_factory: pytest.TempPathFactory, lengths: list[int]) -> TokenStore:
    """Documents whose tokens all differ: 1, 2, 3, …"""
    edges = np.cumsum([1, *lengths])
    documents = [list(range(a, b)) for a, b in pairwise(edges)]
    return make_store(tmp_path_factory.mktemp("store"), documents)


def all_rows(packing: Packing, epoch: int = 0) -> Rows:
    return packing.rows(epoch, np.arange(packing.num_rows))


def successors(store: TokenStore) -> dict[int, int]:
    """Token -> the one that follows it in its document; the end-of-document id after the last."""
    following: dict[int, int] = {}
    for i in range(store.num_documents):
        ids = [*store.document(i).tolist(), 0]
        following.update(pairwise(ids[1:]))
    return following


@SLOW_SETUP
@given(lengths=LENGTHS, seq_len=st.integers(2, 12), epoch=st.integers(0, 3), mask=st.booleans())
def test_concat_predicts_every_token_and_every_end_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, epoch: int, mask: bool
) -> None:
    store = numbered_store(tmp_path_factory, lengths)
    assume(store.num_tokens > seq_len)
    packing = ConcatPackingConfig(document_mask=mask).build(store, seq_len=seq_len, seed=7)
    rows = all_rows(packing, epoch)
    assert rows.input_ids.shape == rows.targets.shape == (-(-store.num_tokens // seq_len), seq_len)
    counts = Counter(rows.targets[rows.targets >= 0].tolist())
    assert counts == Counter(store.gather(np.arange(store.num_tokens)).tolist())
    assert packing.efficiency == (rows.targets >= 0).mean()
    following = successors(store)
    for token, target in zip(rows.input_ids.ravel(), rows.targets.ravel(), strict=True):
        if target >= 0 and token != 0:
            assert following[int(token)] == target
    inside = rows.targets[:, :-1] == rows.input_ids[:, 1:]
    assert (inside | (rows.targets[:, :-1] == -100)).all()


@SLOW_SETUP
@given(lengths=LENGTHS, seq_len=st.integers(2, 12))
def test_concat_segments_are_the_documents(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int
) -> None:
    store = numbered_store(tmp_path_factory, lengths)
    assume(store.num_tokens > seq_len)
    rows = all_rows(ConcatPackingConfig().build(store, seq_len=seq_len, seed=3))
    assert rows.segment_ids is not None
    assert rows.positions is not None
    for ids, segments, positions in zip(rows.input_ids, rows.segment_ids, rows.positions, strict=True):
        segment, position = 1, 0
        for t, token in enumerate(ids):
            if token == 0 and t > 0:
                segment, position = segment + 1, 0
            assert (segments[t], positions[t]) == (segment, position)
            position += 1


def test_without_document_mask_or_other_documents_there_are_no_segments(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    two, one = numbered_store(tmp_path_factory, [9, 9]), numbered_store(tmp_path_factory, [30])
    for store, mask, expected in (two, True, True), (two, False, False), (one, True, False):
        packing = ConcatPackingConfig(document_mask=mask).build(store, seq_len=4, seed=0)
        for epoch in range(4):
            rows = all_rows(packing, epoch)
            assert (rows.segment_ids is not None) is expected
            assert (rows.positions is not None) is expected


def test_one_document_gives_crops_at_a_new_phase_each_epoch(tmp_path_factory: pytest.TempPathFactory) -> None:
    store = numbered_store(tmp_path_factory, [99])
    packing = ConcatPackingConfig().build(store, seq_len=8, seed=0)
    phases = set()
    for epoch in range(20):
        starts = all_rows(packing, epoch).input_ids[:, 0]
        assert len({int(s) % 8 for s in starts if s < 99}) <= 2  # the circle closes once
        phases.add(int(starts[0]) % 8)
    assert len(phases) > 3


@pytest.mark.parametrize("kind", ["concat", "best_fit"])
def test_rows_are_a_function_of_seed_epoch_and_index(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    store = numbered_store(tmp_path_factory, [5, 17, 3, 8, 11, 2, 30, 4])
    config = ConcatPackingConfig() if kind == "concat" else BestFitPackingConfig()

    def rows(seed: int, epoch: int) -> list[list[int]]:
        return all_rows(config.build(store, seq_len=6, seed=seed), epoch).input_ids.tolist()

    packing = config.build(store, seq_len=6, seed=1)
    for epoch in (0, 3, 1, 0, 2):
        whole = rows(1, epoch)
        for i in np.random.default_rng(0).permutation(packing.num_rows):
            assert packing.rows(epoch, np.array([i])).input_ids.tolist() == [whole[i]]
    assert rows(1, 0) != rows(2, 0)
    assert rows(1, 0) != rows(1, 1)


@SLOW_SETUP
@given(lengths=LENGTHS, seq_len=st.integers(2, 12), epoch=st.integers(0, 2))
def test_best_fit_holds_every_token_once_and_splits_only_long_documents(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, epoch: int
) -> None:
    store = numbered_store(tmp_path_factory, lengths)
    assume(store.num_tokens > seq_len)
    packing = BestFitPackingConfig().build(store, seq_len=seq_len, seed=5)
    rows = all_rows(packing, epoch)
    assert rows.segment_ids is not None
    assert rows.positions is not None
    real = rows.segment_ids > 0
    assert Counter(rows.input_ids[real].tolist()) == Counter(store.gather(np.arange(store.num_tokens)).tolist())
    assert ((rows.targets == -100) == ~real).all()
    assert packing.efficiency == real.mean()
    following, pieces = successors(store), []
    for ids, targets, segments, positions in zip(*rows, strict=True):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            piece = ids[here].tolist()
            pieces.append(piece)
            assert positions[here].tolist() == list(range(len(piece)))
            assert targets[here][:-1].tolist() == piece[1:]
            assert piece[-1] == 0 or following[piece[-1]] == targets[here][-1]
        assert (np.diff(np.append(segments, 0)) <= 1).all()
    whole = [piece for piece in pieces if piece[0] == 0]
    assert len(whole) == store.num_documents
    for length in lengths:
        if length + 1 <= seq_len:
            assert any(len(piece) == length + 1 for piece in whole)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_best_fit_decreasing_is_its_plain_form(lengths: list[int]) -> None:
    bins, used = best_fit(np.array(lengths), 20)
    rooms: list[int] = []
    for size in sorted(lengths, reverse=True):
        fitting = [b for b in range(len(rooms)) if rooms[b] >= size]
        if fitting:
            chosen = min(fitting, key=lambda b: rooms[b])
        else:
            chosen = len(rooms)
            rooms.append(20)
        rooms[chosen] -= size
    assert used == len(rooms)
    filled = np.bincount(bins, weights=np.array(lengths), minlength=used)
    assert sorted(20 - filled) == sorted(rooms)  # which of several equal rooms is taken is free


@given(st.integers(0, 500), st.integers(0, 2**31), st.integers(0, 9))
def test_permutations_are_permutations(n: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(n, seed, epoch, "rows").tolist()) == list(range(n))


def test_permutations_never_change() -> None:
    assert permutation(8, 0, 0, "rows").tolist() == GOLDEN
    assert permutation(8, 0, 1, "rows").tolist() != GOLDEN


def test_permutations_are_even() -> None:
    places = np.array([permutation(10, seed, "x") for seed in range(4000)])
    counts = np.array([np.bincount(places[:, i], minlength=10) for i in range(10)])
    chi2 = ((counts - 400) ** 2 / 400).sum()
    assert 40 < chi2 < 135  # 81 degrees of freedom


def test_the_order_of_rows_is_shuffled_anew_by_seed_and_epoch(tmp_path_factory: pytest.TempPathFactory) -> None:
    store = numbered_store(tmp_path_factory, [399])

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        """Number of each row along the stream; one document leaves nothing else to shuffle."""
        starts = all_rows(ConcatPackingConfig().build(store, seq_len=8, seed=seed), epoch).input_ids[:, 0]
        return tuple(int(n) for n in np.argsort(starts % 400))

    assert len({order(0, 0), order(1, 0), order(0, 1), tuple(range(50))}) == 4
