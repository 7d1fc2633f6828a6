"""The run directory: layout, status, lock; rows 16 and 43 of the fault matrix."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from graft.errors import ResourceError
from graft.training import durable
from graft.training import lock as lock_module
from graft.training.lock import Process, RunLock
from graft.training.run_dir import RunDirectory, Status, environment


def test_opening_makes_the_layout_and_its_parent(tmp_path):
    with RunDirectory.open(tmp_path / "runs" / "one") as run:
        assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "lock", "tokenizer"]
        assert run.checkpoints.is_dir()
        assert run.tokenizer.is_dir()
        assert run.file("tokenizer", "vocab.json") == run.path / "tokenizer" / "vocab.json"
        assert (run.metrics.name, run.events.name) == ("metrics.jsonl", "events.jsonl")


def test_opening_again_changes_nothing(tmp_path):
    with RunDirectory.open(tmp_path / "one") as run:
        run.write_status("preempted", 3, "asked to stop", resumable=True)
    with RunDirectory.open(str(tmp_path / "one")) as run:
        assert run.read_status() == Status("preempted", 3, "asked to stop", True)


def test_half_written_small_files_are_swept(tmp_path):
    RunDirectory.open(tmp_path).close()
    (tmp_path / "status.json.tmp-77").write_text("{")
    RunDirectory.open(tmp_path).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "lock", "tokenizer"]


def test_looking_at_a_run_touches_nothing(tmp_path):
    run = RunDirectory(tmp_path / "one")
    assert run.read_status() is None
    assert not run.path.exists()


def test_status_is_replaced_in_one_step(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    run.write_status("running", 1, resumable=True)
    seen = []
    rename = os.rename

    def look(source, target, **options):
        seen.append((json.loads(Path(target).read_bytes())["state"], json.loads(Path(source).read_bytes())["state"]))
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", look)
    assert run.write_status("done", 2, "all steps done", resumable=False, exit_code=0)
    assert seen == [("running", "done")]
    assert run.read_status() == Status("done", 2, "all steps done", False, 0)
    assert {"pid", "host", "time"} < set(json.loads(run.file("status.json").read_text()))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"state": "done"}'])
def test_a_status_that_cannot_be_read_is_none(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    assert RunDirectory(tmp_path).read_status() is None


def test_a_status_that_cannot_be_written_does_not_stop_the_run(tmp_path, caplog):
    assert not RunDirectory(tmp_path / "gone").write_status("running", 1, resumable=True)
    assert "status.json" in caplog.text


def test_config_and_environment_are_written(tmp_path):
    with RunDirectory.open(tmp_path / "one") as run:
        run.write_config("name: é # as given\n", "name: é\nseed: 0\n")
        facts = run.write_environment()
    assert run.file("config.yaml").read_text() == "name: é # as given\n"
    assert run.file("config.resolved.yaml").read_text() == "name: é\nseed: 0\n"
    assert json.loads(run.file("env.json").read_text()) == facts
    assert facts["versions"]["torch"]
    assert facts["host"] == socket.gethostname()
    assert facts["argv"] == sys.argv


def test_a_config_that_cannot_be_written_is_a_resource_error(tmp_path):
    with pytest.raises(ResourceError, match=r"config\.yaml: cannot be written: No such file or directory"):
        RunDirectory(tmp_path / "gone").write_config("a", "b")


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_environment_names_the_commit_and_whether_files_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["git"] is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    (tmp_path / "file").write_text("one")
    for command in (["init", "-q"], ["add", "file"], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert environment()["git"] == {"commit": commit, "modified": False}
    (tmp_path / "file").write_text("two")
    assert environment()["git"] == {"commit": commit, "modified": True}
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert environment()["git"] is None


# ------------------------------------------------------------------ row 16


@pytest.mark.fault
def test_a_missing_place_is_refused(tmp_path):
    with pytest.raises(ResourceError, match=r"no/such does not exist.*create it") as caught:
        RunDirectory.open(tmp_path / "no" / "such" / "runs" / "one")
    assert caught.value.exit_code == 6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault
@pytest.mark.parametrize("place", ["file", "file/one", "run/checkpoints-is-a-file"])
def test_a_place_that_is_a_file_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / "checkpoints-is-a-file").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints-is-a-file" / "checkpoints").write_text("")
    with pytest.raises(ResourceError, match=r"cannot be written: (File exists|Not a directory)"):
        RunDirectory.open(tmp_path / place)


@pytest.mark.fault
def test_a_full_disk_is_refused_before_training(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "replace", full)
    with pytest.raises(ResourceError, match=r"cannot be written: No space left on device; expected .*; free space"):
        RunDirectory.open(tmp_path / "one")


@pytest.mark.fault
@pytest.mark.parametrize("existing", [False, True])
def test_a_read_only_place_is_refused(existing):
    """Run by a child that is nobody special: nothing is read-only to root."""
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        place = Path(home, "runs")
        (place / "one").mkdir(parents=True) if existing else place.mkdir()
        for folder in (place / "one", place) if existing else (place,):
            folder.chmod(0o555)
        child = os.fork()
        if child == 0:
            code = 99
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                RunDirectory.open(place / "one")
            except ResourceError as error:
                code = int(error.exit_code) if "Permission denied" in str(error) else 98
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 6
        for folder in (place, place / "one") if existing else (place,):
            folder.chmod(0o755)


# ------------------------------------------------------------------ row 43

HOLDER = """
    import os, sys, time
    from pathlib import Path
    from graft.training.lock import RunLock
    lock = RunLock(Path(sys.argv[1]))
    lock.acquire()
    if os.fork() == 0:  # a data worker, which may outlive the trainer
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.mark.fault
def test_a_second_process_is_refused_and_a_dead_ones_lock_taken_over(tmp_path, caplog):
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(ResourceError) as caught:
            RunLock(path).acquire()
        assert caught.value.exit_code == 6
        for text in (f"process {holder.pid} on {socket.gethostname()}", "since 20", "one process per run directory"):
            assert text in str(caught.value)
        with pytest.raises(ResourceError, match="in use by"):
            RunDirectory.open(tmp_path)

        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # still there, and no longer holding anything
        lock = RunLock(path)
        lock.acquire()
        assert f"took over the lock of process {holder.pid}" in caplog.text
        lock.release()
    finally:
        holder.kill()
        os.kill(worker, signal.SIGKILL)
        holder.wait()
        holder.stdout.close()


@pytest.mark.fault
def test_a_released_lock_is_free_without_a_warning(tmp_path, caplog):
    lock, other = RunLock(tmp_path / "lock"), RunLock(tmp_path / "lock")
    lock.acquire()
    with pytest.raises(ResourceError, match=f"in use by process {os.getpid()} "):
        other.acquire()
    assert (lock.held, other.held) == (True, False)
    lock.release()
    lock.release()
    other.acquire()
    assert other.held
    other.release()
    assert caplog.text == ""


@pytest.mark.fault
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"host": 1}', b"\xff"])
def test_a_lock_file_in_any_state_is_no_obstacle_when_nobody_holds_it(tmp_path, text):
    (tmp_path / "lock").write_bytes(text)
    lock = RunLock(tmp_path / "lock")
    lock.acquire()
    assert lock.held
    lock.release()


@pytest.mark.fault
def test_where_the_file_system_has_no_locks_the_record_decides(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock_module, "_system_lock", lambda descriptor: None)
    me = Process.current()
    assert me.may_live()
    dead = [Process(me.host, me.pid, me.born + 1), Process(me.host, 2**22 + 5, 0), Process(me.host, 2**70, 1)]
    alive = [me, Process("some-other-machine", 1, 1), Process(me.host, me.pid, 0)]
    for process in (*dead, *alive):
        record = {"host": process.host, "pid": process.pid, "born": process.born, "since": 0.0}
        (tmp_path / "lock").write_text(json.dumps(record))
        lock = RunLock(tmp_path / "lock")
        if process in alive:
            with pytest.raises(ResourceError, match=f"in use by process {process.pid} on {process.host}"):
                lock.acquire()
        else:
            lock.acquire()
            lock.release()
            assert f"took over the lock of process {process.pid}" in caplog.text


@pytest.mark.fault
def test_a_lock_that_cannot_be_written_is_a_resource_error(tmp_path):
    with pytest.raises(ResourceError, match="cannot open the lock file: No such file"):
        RunLock(tmp_path / "gone" / "lock").acquire()
