"""What the checkpoint store promises on a good day; the bad days are in tests/faults/test_checkpoint_faults.py."""

from __future__ import annotations

import json
import logging
import os

import pytest
import torch

from graft.errors import CheckpointError
from graft.training import checkpoint as checkpoint_module
from graft.training import tensor_files
from graft.training.checkpoint import CheckpointStore
from graft.training.checkpoint_reader import read_checkpoint, verify_checkpoint
from graft.training.lock import Process
from graft.training.manifest import Manifest
from graft.training.tensor_files import compare_tensors, read_tensors, require_same_tensors


def save(store, step, score=None, value=None):
    weight = torch.full((3,), float(step if value is None else value))
    return store.save(step, {"model": {"weight": weight}}, {"run": {"step": step}}, {"config": "abc"}, score=score)


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def steps(store):
    return [c.step for c in store.list_valid()]


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2, keep_best=0)


def test_what_was_saved_is_loaded(store):
    tensors = {
        "model": {
            "w": torch.randn(3, 4),
            "b": torch.randn(2).bfloat16(),
            "n": torch.tensor(2**40),
            "e": torch.empty(0, 2),
        },
        "optimizer": {"m": torch.randn(2, 2).half(), "flag": torch.tensor([True, False])},
    }
    documents = {"run": {"position": [1, 2.5, None, "é"]}}
    path = store.save(7, tensors, documents, {"config_hash": "abc", "threads": 1}, score=1.25)
    loaded = store.load()
    assert path == loaded.path == store.folder / "step-00000007"
    assert loaded.step == 7
    assert loaded.documents == documents
    assert loaded.manifest.metadata == {"config_hash": "abc", "threads": 1}
    assert loaded.manifest.score == 1.25
    assert {stem: set(named) for stem, named in loaded.tensors.items()} == {k: set(v) for k, v in tensors.items()}
    for stem, named in tensors.items():
        for name, tensor in named.items():
            assert loaded.tensors[stem][name].dtype == tensor.dtype
            assert torch.equal(loaded.tensors[stem][name], tensor)


def test_views_and_strides_are_stored_as_their_values(store):
    base = torch.arange(12.0).reshape(3, 4)
    views = {"transposed": base.t(), "top": base[:2], "bottom": base[1:], "grad": base.clone().requires_grad_()}
    store.save(1, {"model": views}, {}, {})
    loaded = store.load().tensors["model"]
    for name, tensor in views.items():
        assert torch.equal(loaded[name], tensor)


def test_loaded_tensors_outlive_their_checkpoint_and_do_not_write_to_it(store):
    save(store, 1)
    loaded = store.load()
    loaded.tensors["model"]["weight"].add_(1)
    assert verify_checkpoint(loaded.path) == []
    for step in (2, 3):
        save(store, step)
    assert not loaded.path.exists()
    assert loaded.tensors["model"]["weight"].tolist() == [2.0, 2.0, 2.0]


def test_nothing_saved_yet_is_a_fresh_start(store):
    assert store.load() is None
    assert (store.latest(), store.best(), store.list_valid()) == (None, None, [])
    store.folder.mkdir()
    assert store.load() is None


def test_the_newest_are_kept_and_latest_names_the_newest(store):
    for step in (5, 10, 15, 20):
        save(store, step)
    assert names(store) == ["latest", "step-00000015", "step-00000020"]
    assert (store.folder / "latest").read_text() == "step-00000020\n"
    assert store.latest() == store.folder / "step-00000020"


def test_order_is_by_step_not_by_time(store):
    old, new = save(store, 5), save(store, 10)
    os.utime(old, (2e9, 2e9))
    os.utime(new, (1e9, 1e9))
    assert store.load().step == 10
    save(store, 15)
    assert steps(store) == [10, 15]


def test_the_best_are_kept_beside_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=2)
    for step, score in ((1, 3.0), (2, 1.0), (3, 2.0), (4, float("nan")), (5, None), (6, 2.5)):
        save(store, step, score)
    assert steps(store) == [2, 3, 6]
    assert store.best() == tmp_path / "step-00000002"
    assert [c.score for c in store.list_valid()] == [1.0, 2.0, 2.5]


def test_of_equal_scores_the_newest_is_best(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=3, keep_best=1)
    for step in (1, 2, 3):
        save(store, step, 1.0)
    assert store.best().name == "step-00000003"


def test_what_happened_is_reported(tmp_path):
    heard = []
    store = CheckpointStore(
        tmp_path, keep_last=1, keep_best=0, report=lambda kind, fields: heard.append((kind, fields))
    )
    save(store, 1)
    save(store, 2)
    assert heard == [("checkpoint_pruned", {"checkpoint": "step-00000001"})]


def test_saving_a_step_again_replaces_it(store):
    save(store, 1)
    save(store, 1, value=5.0)
    assert names(store) == ["latest", "step-00000001"]
    assert store.load().tensors["model"]["weight"][0] == 5.0


def test_while_a_step_is_replaced_the_old_one_is_still_found(store, monkeypatch):
    save(store, 1)

    def crash(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        checkpoint_module, "fault_point", lambda site, *_, **__: crash(site) if "rename" in site else None
    )
    with pytest.raises(KeyboardInterrupt):
        save(store, 1, value=5.0)
    monkeypatch.undo()
    # the worst instant: the old one stepped aside, the new one has not got its name
    (store.folder / "step-00000001").rename(store.folder / "step-00000001.tmp-elsewhere-1-0")
    assert store.load().tensors["model"]["weight"][0] == 1.0
    assert steps(store) == [1]
    store.sweep()
    assert names(store) == ["latest", "step-00000001"]
    assert store.load().tensors["model"]["weight"][0] == 1.0


def test_an_older_step_can_be_named(store):
    first = save(store, 1)
    save(store, 2)
    assert store.load(first).step == read_checkpoint(first).step == 1


def test_going_back_sets_later_checkpoints_aside(store):
    for step in (10, 20):
        save(store, step)
    assert [p.name for p in store.set_aside_after(10)] == ["step-00000020.abandoned"]
    save(store, 15)
    assert store.load().step == 15
    save(store, 20)
    store.set_aside_after(15)
    assert (store.folder / "step-00000020.abandoned-2").is_dir()
    assert steps(store) == [15]


def test_sweeping_spares_a_running_process(store):
    save(store, 1)
    me = Process.current()
    mine = store.folder / f"step-00000002.tmp-{me.host}-{me.pid}-{me.born}"
    reborn = store.folder / f"step-00000003.tmp-{me.host}-{me.pid}-{me.born + 1}"
    elsewhere = store.folder / f"step-00000004.tmp-not-{me.host}-{me.pid}-{me.born}"
    for folder in (mine, reborn, elsewhere):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    leftover = store.folder / "latest.tmp-123"
    leftover.write_text("step")
    assert sorted(store.sweep()) == sorted([reborn, elsewhere, leftover])
    assert names(store) == sorted(["latest", "step-00000001", mine.name])


def test_a_whole_checkpoint_is_hashed_once(store, monkeypatch):
    hashed = []
    original = checkpoint_module.verified_manifest
    monkeypatch.setattr(checkpoint_module, "verified_manifest", lambda f: (hashed.append(f.name), original(f))[1])
    for step in (1, 2, 3):
        save(store, step)
    assert hashed == [f"step-{step:08d}" for step in (1, 2, 3)]


def test_damage_after_it_was_hashed_is_still_seen(store):
    for step in (1, 2):
        save(store, step)
    assert steps(store) == [1, 2]
    weights = store.folder / "step-00000002" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert steps(store) == [1]
    assert store.latest() == store.folder / "step-00000001"


def test_tied_weights_given_twice_are_each_stored(store):
    shared = torch.ones(2)
    store.save(1, {"model": {"a": shared, "b": shared}}, {}, {})
    assert sorted(store.load().tensors["model"]) == ["a", "b"]


@pytest.mark.parametrize("missing", ["step-00000009", "."])
def test_a_named_checkpoint_that_is_not_there_is_an_error(store, missing):
    save(store, 1)
    with pytest.raises(CheckpointError, match=r"no such checkpoint|manifest\.json is missing"):
        store.load(store.folder / missing)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 8 + b"{}", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_safetensors_file_is_refused_before_it_is_opened(tmp_path, monkeypatch, content):
    monkeypatch.setattr(tensor_files, "load_file", lambda path: pytest.fail("opened"))
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors is .*no safetensors file"):
        read_tensors(tmp_path / "x.safetensors")


def test_differences_name_every_tensor():
    stored = {"a": torch.zeros(2), "b": torch.zeros(2, 3), "old": torch.zeros(())}
    expected = {"a": torch.zeros(2), "b": torch.zeros(3, 2, device="meta"), "new": torch.zeros(4)}
    differences = compare_tensors(stored, expected)
    assert differences.missing == ("new [4]",)
    assert differences.unexpected == ("old []",)
    assert differences.misshaped == ("b is [2, 3], expected [3, 2]",)
    with pytest.raises(CheckpointError) as caught:
        require_same_tensors(stored, expected, where="step-00000001")
    for text in (
        "step-00000001",
        "1 missing: new [4]",
        "1 unexpected: old []",
        "mis-shaped: b is [2, 3], expected [3, 2]",
    ):
        assert text in str(caught.value)
    assert caught.value.exit_code == 4
    require_same_tensors(expected, expected, where="same")


def test_a_manifest_reads_back_and_holds_its_own_hash(tmp_path):
    store = CheckpointStore(tmp_path)
    path = save(store, 3, score=0.5)
    written = json.loads((path / "manifest.json").read_text())
    assert set(written) == {"format", "step", "score", "files", "metadata", "blake2b"}
    assert set(written["files"]) == {"model.safetensors", "run.json"}
    assert written["files"]["run.json"]["size"] == (path / "run.json").stat().st_size
    again = Manifest(3, 0.5, store.list_valid()[0].manifest.files, {"config": "abc"})
    assert again.to_bytes() == (path / "manifest.json").read_bytes()


def test_a_stale_latest_is_reported_and_the_scan_wins(store, caplog):
    heard = []
    save(store, 1)
    save(store, 2)
    (store.folder / "latest").write_text("step-00000001\n")
    reporting = CheckpointStore(store.folder, report=lambda kind, fields: heard.append((kind, fields)))
    with caplog.at_level(logging.WARNING):
        assert reporting.load().step == 2
    assert heard == [("latest_stale", {"latest": "step-00000001", "checkpoint": "step-00000002"})]
    assert verify_checkpoint(store.folder / "step-00000002") == []
