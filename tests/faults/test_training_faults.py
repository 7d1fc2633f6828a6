"""Processes killed, signalled and starved in the middle of training. Each trains the tiny run in a process of its own.

"Equal" means: final weights and metric lines are those of a run that nothing happened to, bit for bit.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from graft import api
from graft.errors import ResourceError
from graft.training.checkpoint import CheckpointStore
from tiny_run import lines, tiny

pytestmark = pytest.mark.fault

STEPS = 60
LONG = (f"training.max_steps={STEPS}", "checkpoint.interval=5", "checkpoint.keep_last=3", "evaluation.interval=20")


def child(folder: Path, out: Path, fault: str, options: dict) -> None:
    """A process that runs ``graft train … --resume auto`` and ends with its exit code."""
    torch.set_num_threads(1)
    os.environ["GRAFT_FAULT"] = fault
    os.fsync = lambda descriptor: None  # nobody cuts the power; waiting for the disk is most of a tiny run's time
    sys.stdout = sys.stderr = io.StringIO()
    address_space = options.get("address_space")
    config = folder / "config.json"
    from graft.errors import GraftError
    from graft.training import session

    session.peak_flops = lambda device, dtype: None  # measuring takes longer than the run
    if address_space:
        _limit_memory_when_training(address_space)
    try:
        api.train(api.load(config, options.get("overrides", ())), out=out, resume="auto", stream=io.StringIO())
    except GraftError as error:
        os._exit(error.exit_code)
    except BaseException:
        os._exit(1)
    os._exit(0)


def _limit_memory_when_training(extra: int) -> None:
    """From the first step on, the process may have only so many bytes more than it has then."""
    from graft.training import session

    original = session.fit

    def starved(*arguments):
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + extra, resource.RLIM_INFINITY))
        return original(*arguments)

    session.fit = starved


@pytest.fixture(scope="session")
def server():
    """Makes processes that have everything imported already: a second saved per case."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "graft.training.session", "graft.generation.engine"])
    return context


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """The tiny run's config, and the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("work")
    experiment = tiny(folder, *LONG)
    (folder / "config.json").write_text(json.dumps(experiment.to_dict()))
    whole = api.train(experiment, out=folder / "whole", stream=io.StringIO())
    weights = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    return folder, weights


@pytest.fixture
def start(server, work):
    """Starts a training process in a run directory; returns it."""
    folder, _ = work
    running = []

    def run(out, fault="", **options):
        process = server.Process(target=child, args=(folder, out, fault, options), daemon=True)
        process.start()
        running.append(process)
        return process

    yield run
    for process in running:
        if process.is_alive():
            process.kill()
            process.join()


def finish(process) -> int:
    process.join(120)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def status(out):
    return json.loads((out / "status.json").read_text())


def events(out, kind):
    return [e for e in lines(out / "events.jsonl") if e["event"] == kind]


def assert_equal_to_uninterrupted(out, work):
    """Reads the finished run's last checkpoint and log."""
    folder, weights = work
    assert (status(out)["state"], status(out)["step"]) == ("done", STEPS)
    loaded = CheckpointStore(out / "checkpoints").load("auto")
    assert loaded is not None
    assert loaded.step == STEPS
    assert loaded.tensors["model"].keys() == weights.keys()
    assert [n for n, t in weights.items() if not torch.equal(t, loaded.tensors["model"][n])] == []
    assert lines(out / "metrics.jsonl") == lines(folder / "whole" / "metrics.jsonl")


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def test_killed_again_and_again_equals_uninterrupted(start, work, tmp_path):
    """Each process goes on from what the one before left, and dies somewhere else."""
    out = tmp_path / "run"
    deaths = (
        "train.step:3:kill",  # fault 1: before the first checkpoint
        "checkpoint.file.3:10:kill",  # fault 2: in a save
        "checkpoint.manifest:15:kill",  # fault 3: saved, not renamed
        "checkpoint.rename:20:kill",  # fault 4: renamed, before latest
        "checkpoint.prune:30:kill",  # fault 5: while pruning
        "train.step:38:kill",  # fault 1: between checkpoints
        "log.append:48:kill",  # fault 45: before a metric line
    )
    for fault in deaths:
        assert finish(start(out, fault)) == -signal.SIGKILL, fault
        found = status(out)
        assert found["state"] == "running", "a killed process has no last word"
        assert found["resumable"] == (fault != deaths[0]), fault
    assert finish(start(out)) == 0
    assert [e["step"] for e in events(out, "resumed")] == [5, 10, 20, 30, 35, 45]
    assert_equal_to_uninterrupted(out, work)


def test_sigterm_finishes_step_and_save_and_says_so(start, work, tmp_path):  # faults 17 and 18
    out = tmp_path / "run"
    for fault, step in (("train.step:13:term", 13), ("checkpoint.file.2:20:term", 20)):
        assert finish(start(out, fault)) == 75
        found = status(out)
        assert (found["state"], found["step"], found["resumable"], found["exit_code"]) == ("preempted", step, True, 75)
        assert "SIGTERM" in found["reason"]
        assert lines(out / "metrics.jsonl")[-1]["step"] == step
        assert events(out, "saved")[-1]["step"] == step
    assert [e["step"] for e in events(out, "saved")] == [5, 10, 13, 15, 20]
    assert finish(start(out)) == 0
    assert_equal_to_uninterrupted(out, work)


def test_the_second_signal_ends_it_at_once_with_the_last_checkpoint_valid(start, work, tmp_path):  # fault 18
    out = tmp_path / "run"
    for second, step in ((signal.SIGINT, 20), (signal.SIGTERM, 40)):
        process = start(out, f"checkpoint.file.2:{step}:sleep=100")
        wait_for(lambda step=step: list(out.glob(f"checkpoints/step-{step:08d}.tmp-*/optimizer.safetensors")))
        time.sleep(0.1)  # the file is there; its fail-point comes right after
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.2)
        assert process.is_alive(), "the first signal lets the save go on"
        os.kill(process.pid, second)
        begin = time.monotonic()
        assert finish(process) == 130
        assert time.monotonic() - begin < 30, "at once, not after the save"
        found = status(out)
        assert (found["state"], found["step"], found["exit_code"]) == ("interrupted", step, 130)
        assert found["resumable"]
    assert finish(start(out)) == 0
    assert [e["step"] for e in events(out, "resumed")] == [15, 35]
    assert_equal_to_uninterrupted(out, work)


@pytest.fixture
def inject(inject, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return inject


def train_here(work, out, *overrides):
    """The same run in this process."""
    folder, _ = work
    return api.train(tiny(folder, *LONG, *overrides), out=out, stream=io.StringIO())


def test_a_full_disk_costs_one_save(work, tmp_path, inject):  # fault 14
    out = tmp_path / "run"
    inject("checkpoint.file.1:10:enospc")
    train_here(work, out)
    assert [e["step"] for e in events(out, "save_failed")] == [10]
    assert [e["step"] for e in events(out, "saved")] == [5, *range(15, STEPS + 1, 5)]
    assert not list(out.glob("checkpoints/*.tmp-*"))
    assert_equal_to_uninterrupted(out, work)


def test_a_disk_that_stays_full_ends_the_run(work, tmp_path, inject):  # fault 14
    out = tmp_path / "run"
    inject(",".join(f"checkpoint.file.1:{step}:enospc" for step in (10, 15, 20)))
    with pytest.raises(ResourceError, match=r"3 saves in a row failed; the newest checkpoint is .*step-00000005"):
        train_here(work, out)
    assert [(e["step"], e["in_a_row"]) for e in events(out, "save_failed")] == [(10, 1), (15, 2), (20, 3)]
    found = status(out)
    assert (found["state"], found["step"], found["resumable"], found["exit_code"]) == ("failed", 20, True, 6)
    assert "No space left on device" in found["reason"]


def test_a_last_save_that_fails_is_an_error(work, tmp_path, inject):  # fault 14
    out = tmp_path / "run"
    inject("checkpoint.file.1:5:enospc")
    with pytest.raises(ResourceError, match="there is no checkpoint"):
        train_here(work, out, "training.max_steps=5")
    assert (status(out)["state"], status(out)["resumable"]) == ("failed", False)


def test_a_log_that_cannot_be_written_leaves_the_training_alone(work, tmp_path, inject):  # fault 15
    out = tmp_path / "run"
    inject("log.append:*:enospc*")
    run = train_here(work, out)
    _, weights = work
    assert all(torch.equal(t, run.model.state_dict()[name]) for name, t in weights.items())
    assert status(out)["state"] == "done"
    said = (out / "train.log").read_text()
    assert said.count("metrics.jsonl cannot be written") == 1
    assert said.count("events.jsonl cannot be written") == 1


def test_a_process_without_memory_says_what_to_do(start, tmp_path):  # fault 42
    out = tmp_path / "run"
    overrides = ("data.seq_len=128", "training.global_batch_size=64", "training.micro_batch_size=64")
    assert finish(start(out, address_space=8 * 2**20, overrides=overrides)) == 6
    assert "training.micro_batch_size: 32" in status(out)["reason"]


def test_two_processes_cannot_train_in_one_directory(start, tmp_path):  # fault 43
    out = tmp_path / "run"
    first = start(out, "train.step:5:sleep=100")
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(lines(out / "metrics.jsonl")) == 4)
    assert finish(start(out)) == 6
    assert first.is_alive()
    assert status(out)["state"] == "running", "the refused process leaves the other's status alone"
