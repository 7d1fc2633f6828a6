"""Token stores: what is written is what is read, across shards, in the smallest type."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.data import store_writer
from graft.data.store import TokenStore, token_dtype
from graft.data.store_writer import StoreWriter
from tiny_data import make_store

DOCUMENTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10, 11, 12], [13]]
STREAM = [0, 1, 2, 3, 0, 4, 0, 5, 6, 0, 7, 8, 9, 10, 11, 12, 0, 13]


@pytest.mark.parametrize(("shard_tokens", "shards"), [(4, 4), (5, 3), (1, 5), (1000, 1)])
def test_documents_come_back_from_any_number_of_shards(
    shard_tokens: int, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "SHARD_TOKENS", shard_tokens)
    store = make_store(tmp_path / "s", DOCUMENTS)
    assert len(store.shards) == shards
    assert store.gather(np.arange(store.num_tokens)).tolist() == STREAM
    assert store.gather(np.array([[17, 0], [4, 4]])).tolist() == [[13, 0], [0, 0]]
    assert [store.document(i).tolist() for i in range(5)] == [[0, *ids] for ids in DOCUMENTS]
    assert store.lengths.tolist() == [len(ids) + 1 for ids in DOCUMENTS]
    copy = pickle.loads(pickle.dumps(store))
    assert copy.gather(np.arange(18)).tolist() == STREAM


def test_the_type_is_the_smallest_that_holds_the_vocabulary(tmp_path: Path) -> None:
    assert token_dtype(65536).itemsize == 2
    assert token_dtype(65537).itemsize == 4
    for vocab, last in (65536, 65535), (65537, 65536):
        store = make_store(tmp_path / str(vocab), [[last]], vocab_size=vocab)
        assert store.document(0).tolist() == [0, last]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
@given(
    documents=st.lists(st.lists(st.integers(1, 99), max_size=6), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=3),
)
def test_a_writer_that_continues_writes_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], cuts: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "SHARD_TOKENS", 7)
        whole = make_store(tmp_path_factory.mktemp("whole"), documents, vocab_size=100)
        folder = tmp_path_factory.mktemp("pieces")
        arrays = [np.array(ids, dtype=np.uint32) for ids in documents]
        state = None
        done = 0
        for cut in [*sorted(min(c, len(documents)) for c in cuts), len(documents)]:
            writer = StoreWriter(folder, vocab_size=100, end_of_document=0, state=state)
            if cut > done:
                writer.append(arrays[done:cut], 0)
            state, done = writer.commit(), cut
            writer.append([np.array([77] * 9, dtype=np.uint32)], 0)  # written after the commit: lost with the process
            writer.close()
        writer = StoreWriter(folder, vocab_size=100, end_of_document=0, state=state)
        writer.finish()
    for file in ["documents.bin", "manifest.json", *(s.file for s in whole.shards)]:
        assert (folder / file).read_bytes() == (whole.folder / file).read_bytes()


def test_large_stores_are_verified_once_and_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graft.data import store as module

    folder = make_store(tmp_path / "s", DOCUMENTS).folder
    monkeypatch.setattr(module, "ALWAYS_VERIFIED_BYTES", 0)
    hashed: list[Path] = []
    real = module.file_hash
    monkeypatch.setattr(module, "file_hash", lambda path: (hashed.append(path), real(path))[1])
    TokenStore.open(folder)
    assert hashed == []
    TokenStore.open(folder, verify=True)
    assert len(hashed) == 2
    (folder / "shard-00000.bin").touch()
    TokenStore.open(folder)
    assert len(hashed) == 4
