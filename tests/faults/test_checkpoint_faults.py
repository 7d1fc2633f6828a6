"""Rows 2 to 14 of the fault matrix, at the level of the checkpoint store."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graft.errors import CheckpointError
from graft.faults import InjectedFault
from graft.training import durable
from graft.training.checkpoint import CheckpointStore, SaveFailed
from graft.training.checkpoint_reader import verify_checkpoint

pytestmark = pytest.mark.fault

STEMS = ("model", "optimizer", "rng")
DOCUMENTS = ("run", "data")
FILES = [f"{stem}.safetensors" for stem in STEMS] + [f"{stem}.json" for stem in DOCUMENTS]


def content(step):
    tensors = {stem: {"x": torch.arange(50.0) + step, "y": torch.tensor(step)} for stem in STEMS}
    return tensors, {stem: {"step": step} for stem in DOCUMENTS}


def save(store, step):
    tensors, documents = content(step)
    return store.save(step, tensors, documents, {"config_hash": "abc"})


def assert_holds(loaded, step):
    tensors, documents = content(step)
    assert loaded.step == step
    assert loaded.documents == documents
    assert set(loaded.tensors) == set(tensors)
    for stem, named in tensors.items():
        assert all(torch.equal(loaded.tensors[stem][name], tensor) for name, tensor in named.items())


@pytest.fixture
def heard():
    return []


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    for step in (10, 20):
        save(CheckpointStore(folder), step)
    return folder


@pytest.fixture
def store(tmp_path, heard, two_checkpoints):
    """Checkpoints of steps 10 and 20."""
    folder = Path(shutil.copytree(two_checkpoints, tmp_path / "checkpoints"))
    return CheckpointStore(folder, keep_last=3, keep_best=0, report=lambda kind, fields: heard.append((kind, fields)))


# ------------------------------------------------------------------ rows 2 to 5: killed

KILLS = {  # fail-point -> the step a later load must find
    **{f"checkpoint.file.{k}": 20 for k in range(len(FILES) + 1)},
    "checkpoint.manifest": 20,
    "checkpoint.rename": 30,
    "checkpoint.latest": 30,
    "checkpoint.prune": 30,
    "checkpoint.removing": 30,
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """For each fail-point a folder with steps 10 and 20, in which a process was killed there while it saved step 30."""
    root = tmp_path_factory.mktemp("killed")
    script = f"""
        import os, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_checkpoint_faults import KILLS, save
        from graft.training.checkpoint import CheckpointStore

        for site in KILLS:
            store = CheckpointStore(Path({str(root)!r}) / site, keep_last=2, keep_best=0)
            save(store, 10)
            save(store, 20)
            child = os.fork()
            if child == 0:
                os.environ["GRAFT_FAULT"] = f"{{site}}:30:kill"
                save(CheckpointStore(store.folder, keep_last=1, keep_best=0), 30)
                os._exit(0)
            print(site, os.WTERMSIG(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return root, dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.parametrize(("site", "step"), KILLS.items())
def test_killed_while_saving(killed, site, step):
    root, signals = killed
    assert signals[site] == str(int(signal.SIGKILL))
    store = CheckpointStore(root / site, keep_last=2, keep_best=0)
    before = {path.name for path in store.folder.iterdir()}
    assert store.latest() == store.folder / f"step-{step:08d}"
    assert_holds(store.load(), step)
    assert not any("corrupt" in path.name for path in store.folder.iterdir())

    left_behind = {name for name in before if ".tmp-" in name}
    expects_leftover = step == 20 or site == "checkpoint.removing"
    assert bool(left_behind) == expects_leftover
    assert {path.name for path in store.sweep()} == left_behind

    save(store, 40)
    assert {path.name for path in store.folder.iterdir()} == {"latest", f"step-{step:08d}", "step-00000040"}


def test_a_valid_checkpoint_remains_at_every_instant_of_pruning(store, monkeypatch):
    """Row 5, without a process: look after every change to the folder."""
    seen = []

    def watched(operation):
        def run(*arguments, **options):
            operation(*arguments, **options)
            seen.append(len(CheckpointStore(store.folder).list_valid()))

        return run

    for name in ("rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    store.keep_last = 1
    save(store, 30)
    save(store, 30)
    monkeypatch.undo()
    assert len(seen) > 20
    assert min(seen) >= 1
    assert [c.step for c in store.list_valid()] == [30]


# ------------------------------------------------------------------ rows 6 to 8: damaged files


def flip(path, where=0.5, bit=1):
    data = bytearray(path.read_bytes())
    data[int((len(data) - 1) * where)] ^= bit
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def grow(path):
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGE = {
    "first byte": lambda path: flip(path, 0.0),
    "middle bit": flip,
    "last bit": lambda path: flip(path, 1.0, 128),
    "truncated": truncate,
    "empty": empty,
    "zero-filled": zero,
    "longer": grow,
    "removed": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_the_older_checkpoint_used(store, heard, caplog, file, damage):
    bad = store.folder / "step-00000020"
    DAMAGE[damage](bad / file)
    assert [c.step for c in store.list_valid()] == [10]
    assert store.latest() == store.folder / "step-00000010"
    (problem,) = verify_checkpoint(bad)
    assert problem.startswith(file)

    assert_holds(store.load(), 10)
    assert not bad.exists()
    assert (store.folder / "step-00000020.corrupt" / "reason.txt").read_text().startswith(file)
    assert heard[0][0] == "checkpoint_quarantined"
    assert heard[0][1]["checkpoint"] == "step-00000020"
    assert file in heard[0][1]["reason"]
    assert file in caplog.text

    save(store, 20)  # the run goes on and reaches the same step again
    assert_holds(store.load(), 20)


def test_a_bit_flipped_anywhere_in_a_manifest_counts(store):
    """Never a crash, and never accepted (unless the JSON still says the same, as after a flip in a blank)."""
    path = store.folder / "step-00000020" / "manifest.json"
    original = path.read_bytes()
    accepted = []
    for index in range(0, len(original), 3):
        damaged = bytearray(original)
        damaged[index] ^= 1 << (index % 8)
        path.write_bytes(damaged)
        if not verify_checkpoint(path.parent) and json.loads(damaged) != json.loads(original):
            accepted.append(index)
    assert accepted == []


def test_a_damaged_checkpoint_named_by_the_user_is_an_error(store):
    bad = store.folder / "step-00000020"
    flip(bad / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors does not match its hash") as caught:
        store.load(bad)
    assert caught.value.exit_code == 4
    assert bad.exists()


def test_a_bit_that_flips_while_saving_is_found_and_nothing_older_is_pruned(store, inject):
    store.keep_last = 1
    inject("checkpoint.file.1:30:corrupt")
    save(store, 30)
    assert [c.step for c in store.list_valid()] == [20]
    assert_holds(store.load(), 20)
    assert (store.folder / "step-00000030.corrupt").is_dir()


def test_damaged_checkpoints_do_not_count_as_kept(store):
    store.keep_last = 2
    flip(store.folder / "step-00000020" / "model.safetensors")
    save(store, 30)
    assert [c.step for c in store.list_valid()] == [10, 30]


def test_a_damaged_checkpoint_of_the_same_step_is_set_aside_by_a_save(store, heard):
    flip(store.folder / "step-00000020" / "model.safetensors")
    save(store, 20)
    assert heard[0][0] == "checkpoint_quarantined"
    assert "model.safetensors" in (store.folder / "step-00000020.corrupt" / "reason.txt").read_text()
    assert_holds(store.load(), 20)


# ------------------------------------------------------------------ row 9: manifest missing or invalid


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "missing"),
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_without_a_manifest_it_is_no_checkpoint(store, heard, text, reason):
    path = store.folder / "step-00000020" / "manifest.json"
    path.unlink() if text is None else path.write_bytes(text)
    assert_holds(store.load(), 10)
    assert heard == [
        ("checkpoint_skipped", {"checkpoint": "step-00000020", "reason": heard[0][1]["reason"]}),
        ("latest_stale", {"latest": "step-00000020", "checkpoint": "step-00000010"}),
    ]
    assert reason in heard[0][1]["reason"]


def signed(body):
    """A manifest with a right hash, as someone who knows the format would forge it."""
    digest = durable.digest_bytes(json.dumps(body, sort_keys=True).encode())
    return json.dumps({**body, "blake2b": digest}).encode()


GOOD = {"format": 1, "step": 20, "score": None, "files": {}, "metadata": {}}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({**GOOD, "format": 99}, "format 99"),
        ({**GOOD, "step": "20"}, "wrong kind"),
        ({**GOOD, "step": 21}, "of step 21"),
        ({**GOOD, "metadata": []}, "wrong kind"),
        ({**GOOD, "score": "low"}, "wrong kind"),
        ({**GOOD, "files": []}, "lacks fields"),
        ({"format": 1}, "lacks fields"),
        ({**GOOD, "files": {"model.safetensors": {}}}, "lacks fields"),
        ({**GOOD, "files": {"../../etc/passwd.json": {"size": 1, "blake2b": ""}}}, "only .safetensors and .json"),
        ({**GOOD, "files": {"model.pt": {"size": 1, "blake2b": ""}}}, "only .safetensors and .json"),
        ({**GOOD, "files": {"manifest.json": {"size": 1, "blake2b": ""}}}, "only .safetensors and .json"),
    ],
)
def test_a_forged_manifest_is_set_aside(store, heard, body, reason):
    (store.folder / "step-00000020" / "manifest.json").write_bytes(signed(body))
    assert_holds(store.load(), 10)
    assert heard[0][0] == "checkpoint_quarantined"
    assert reason in heard[0][1]["reason"]


# ------------------------------------------------------------------ row 10: all corrupt


def test_all_corrupt_is_an_error_that_lists_each_reason_and_stays_one(store):
    flip(store.folder / "step-00000020" / "model.safetensors")
    truncate(store.folder / "step-00000010" / "data.json")
    for _ in range(2):  # the second time they have already been set aside: still no fresh start
        with pytest.raises(CheckpointError) as caught:
            store.load()
        assert caught.value.exit_code == 4
        for text in ("step-00000020", "model.safetensors does not match", "step-00000010", "data.json has"):
            assert text in str(caught.value)


def test_no_manifest_anywhere_is_no_fresh_start(store):
    for step in (10, 20):
        (store.folder / f"step-{step:08d}" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000020: manifest\.json is missing.*step-00000010"):
        store.load()


# ------------------------------------------------------------------ row 11: latest


@pytest.mark.parametrize("text", [b"step-00000099\n", b"step-00000010\n", b"", b"\xff\0", b"../../elsewhere", None])
def test_the_scan_wins_over_latest(store, text):
    latest = store.folder / "latest"
    latest.unlink() if text is None else latest.write_bytes(text)
    assert_holds(store.load(), 20)
    assert store.latest() == store.folder / "step-00000020"


def test_latest_without_any_checkpoint_is_no_fresh_start(store):
    for step in (10, 20):
        shutil.rmtree(store.folder / f"step-{step:08d}")
    with pytest.raises(CheckpointError, match="latest: names a checkpoint, and there is none"):
        store.load()


# ------------------------------------------------------------------ rows 12 and 13: hostile files


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def put(folder, name, data):
    """Replaces a file of a checkpoint together with its entry in the manifest."""
    (folder / name).write_bytes(data)
    body = json.loads((folder / "manifest.json").read_text())
    del body["blake2b"]
    body["files"][name] = {"size": len(data), "blake2b": durable.digest_bytes(data)}
    (folder / "manifest.json").write_bytes(signed(body))


def pickles(marker):
    bomb = Malicious(marker)
    yield pickle.dumps(bomb)
    for zipped in (True, False):
        path = marker.with_name(f"bomb-{zipped}.pt")
        torch.save(bomb, path, _use_new_zipfile_serialization=zipped)
        yield path.read_bytes()


def test_a_pickle_in_place_of_weights_is_refused_and_never_run(store, tmp_path):
    marker = tmp_path / "marker"
    for data in pickles(marker):
        pickle_works = marker.with_name("proof")
        pickle.loads(pickle.dumps(Malicious(pickle_works)))
        assert pickle_works.exists(), "the bomb must be live for this test to mean anything"
        for step in (10, 20):
            put(store.folder / f"step-{step:08d}", "model.safetensors", data)
        for name in (store.folder / "step-00000020", "auto"):
            with pytest.raises(CheckpointError, match=r"model\.safetensors is no safetensors file"):
                store.load(name)
        for path in store.folder.glob("step-*.corrupt*"):
            path.rename(path.with_name(path.name.split(".")[0]))
    assert not marker.exists()


def test_another_tools_checkpoint_is_refused_and_never_run(tmp_path):
    marker = tmp_path / "marker"
    bomb = pickle.dumps(Malicious(marker))
    for name in (".metadata", "model.pt", "pytorch_model.bin"):
        store = CheckpointStore(tmp_path / name.strip("."))
        folder = store.folder / "step-00000001"
        folder.mkdir(parents=True)
        (folder / name).write_bytes(bomb)
        with pytest.raises(CheckpointError, match=f"{name} is or may hold a pickle, which is never opened"):
            store.load()
        with pytest.raises(CheckpointError, match="is a file, and a checkpoint is a folder"):
            store.load(folder / name)
    assert not marker.exists()


@pytest.mark.parametrize("claimed", [2**40, 2**63, 2**64 - 1, 200 * 2**20, 1000])
def test_an_absurd_header_is_refused_quickly_and_in_small_memory(store, claimed):
    put(store.folder / "step-00000020", "model.safetensors", struct.pack("<Q", claimed) + b"{}" + bytes(100))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"header of {claimed} bytes"):
            store.load(store.folder / "step-00000020")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert_holds(store.load(), 10)


HEADERS = {
    "no JSON": b"x" * 16,
    "offsets beyond the file": b'{"x":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}',
    "offsets backwards": b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
    "shape that overflows": b'{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}',
    "unknown dtype": b'{"x":{"dtype":"PICKLE","shape":[1],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_lying_header_is_refused_without_a_traceback(store, header):
    data = struct.pack("<Q", len(HEADERS[header])) + HEADERS[header] + bytes(4)
    put(store.folder / "step-00000020", "model.safetensors", data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        store.load(store.folder / "step-00000020")
    assert_holds(store.load(), 10)


@pytest.mark.parametrize("text", [b"not json", b"[1]", b"[" * 100_000, b"\xff"])
def test_a_document_with_a_right_hash_but_no_object_is_refused(store, text):
    put(store.folder / "step-00000020", "run.json", text)
    with pytest.raises(CheckpointError, match=r"run\.json"):
        store.load(store.folder / "step-00000020")
    assert_holds(store.load(), 10)


def test_a_link_in_place_of_a_file_is_refused(store, tmp_path):
    target = store.folder / "step-00000020" / "model.safetensors"
    target.rename(tmp_path / "moved")
    target.symlink_to(tmp_path / "moved")
    assert_holds(store.load(), 10)


# ------------------------------------------------------------------ row 14: disk full

SITES = [site for site in KILLS if KILLS[site] == 20]


@pytest.mark.parametrize("site", SITES)
def test_a_full_disk_costs_one_save_and_nothing_else(store, inject, site):
    before = {path.name for path in store.folder.iterdir()}
    inject(f"{site}:30:enospc")
    with pytest.raises(SaveFailed, match="step 30 could not be saved: No space left on device") as caught:
        save(store, 30)
    assert caught.value.step == 30
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert {path.name for path in store.folder.iterdir()} == before
    assert_holds(store.load(), 20)
    save(store, 40)
    assert_holds(store.load(), 40)


@pytest.mark.parametrize("site", ["checkpoint.latest", "checkpoint.prune", "checkpoint.removing"])
def test_trouble_after_the_rename_is_no_failed_save(store, heard, inject, site):
    store.keep_last = 1
    inject(f"{site}:30:enospc")
    save(store, 30)
    assert heard[-1][0] == "checkpoint_warning"
    assert "No space left" in heard[-1][1]["reason"]
    assert_holds(store.load(), 30)


def test_a_bug_while_saving_leaves_nothing_behind_either(store, inject):
    inject("checkpoint.manifest:30:raise")
    with pytest.raises(InjectedFault):
        save(store, 30)
    assert not list(store.folder.glob("*.tmp-*"))


@pytest.mark.parametrize(("limit", "refused"), [(0, FILES[0]), (100, FILES[0]), (600, "manifest.json")])
def test_a_file_size_limit_is_met_like_a_full_disk(store, limit, refused):
    """The operating system itself refuses."""
    sizes = {path.name: path.stat().st_size for path in (store.folder / "step-00000020").iterdir()}
    assert next(name for name in [*FILES, "manifest.json"] if sizes[name] > limit) == refused
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(SaveFailed, match="File too large"):
            save(store, 30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(store.folder.glob("*.tmp-*"))
    assert_holds(store.load(), 20)


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small disk takes root on Linux")
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this machine does not let root mount")
    try:
        store = CheckpointStore(disk / "checkpoints", keep_last=1, keep_best=0)
        store.save(1, {"model": {"w": torch.zeros(20_000)}}, {}, {})
        with pytest.raises(SaveFailed, match="No space left on device"):
            store.save(2, {"model": {"w": torch.zeros(60_000)}}, {}, {})
        assert not list(store.folder.glob("*.tmp-*"))
        assert store.load().step == 1
        store.save(3, {"model": {"w": torch.zeros(20_000)}}, {}, {})
        assert [c.step for c in store.list_valid()] == [3]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_written_is_a_failed_save(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(SaveFailed, match=r"File exists|Not a directory"):
        save(CheckpointStore(tmp_path / "checkpoints"), 1)


def test_a_pretend_safetensors_helper_really_is_one(tmp_path):
    """The files we replace above are ordinary safetensors files: an ordinary one in their place is accepted."""
    store = CheckpointStore(tmp_path)
    folder = store.save(1, {"model": {"x": torch.zeros(2)}}, {}, {})
    save_file({"x": torch.ones(2)}, tmp_path / "other")
    put(folder, "model.safetensors", (tmp_path / "other").read_bytes())
    assert store.load().tensors["model"]["x"].tolist() == [1.0, 1.0]
