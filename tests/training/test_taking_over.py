"""What is refused before a session takes a run over leaves the run's status alone; what fails later is the run's."""

from __future__ import annotations

import io
import json

import pytest

from graft import api
from graft.errors import CheckpointError, ConfigError, DataError, GraftError, Interrupted, Preempted, ResourceError
from graft.training.run_dir import RunDirectory
from tiny_run import lines, write_text


def train(experiment, folder, *, resume="auto", **options):
    return api.train(experiment, out=folder, resume=resume, stream=io.StringIO(), **options)


@pytest.fixture
def finished(tiny, tmp_path):
    train(tiny("training.max_steps=2"), tmp_path / "run")
    return tmp_path / "run"


def refused(folder, kind, attempt):
    """``attempt`` raises ``kind`` and the status stays as it was, byte for byte."""
    before = (folder / "status.json").read_bytes()
    with pytest.raises(kind) as caught:
        attempt()
    assert (folder / "status.json").read_bytes() == before
    return caught.value


def test_the_same_command_again_is_refused_and_the_run_stays_done(tiny, finished):
    refused(finished, CheckpointError, lambda: train(tiny("training.max_steps=2"), finished, resume="never"))


def test_a_finished_run_has_nothing_left_and_nothing_is_written_over(tiny, finished):
    kept = {name: (finished / name).read_bytes() for name in ("status.json", "config.yaml", "env.json")}
    stream = io.StringIO()
    run = api.train(tiny("training.max_steps=2"), out=finished, resume="auto", stream=stream, config_text="# other\n")
    assert run.step == 2
    assert "the run is finished" in stream.getvalue()
    assert {name: (finished / name).read_bytes() for name in kept} == kept


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        pytest.param(["model.num_layers=3"], CheckpointError, id="another model"),
        pytest.param(["optimizer.type=muon", "optimizer.learning_rate=1e-3"], CheckpointError, id="another optimizer"),
        pytest.param(["data.source.path=gone.txt"], DataError, id="missing data"),
        pytest.param(["data.seq_len=50000"], DataError, id="too little data"),
        pytest.param(["runtime.device=cuda:77"], GraftError, id="no such device"),
        pytest.param(["runtime.kernels=fla"], GraftError, id="a kernel that cannot be used"),
    ],
)
def test_what_cannot_go_on_in_a_finished_run_is_refused(tiny, finished, overrides, kind):
    error = refused(finished, kind, lambda: train(tiny("training.max_steps=4", *overrides), finished))
    (event,) = (e for e in lines(finished / "events.jsonl") if e["event"] == "refused")
    assert event["reason"] == str(error)


def test_changed_data_is_refused(tiny, tmp_path, finished):
    write_text(tmp_path / "text.txt", seed=1)
    refused(finished, DataError, lambda: train(tiny("training.max_steps=4"), finished))


def test_a_checkpoint_that_cannot_be_read_is_refused(tiny, tmp_path, finished):
    (tmp_path / "empty").mkdir()
    refused(finished, CheckpointError, lambda: train(tiny("training.max_steps=4"), finished, resume=tmp_path / "empty"))
    refused(finished, ConfigError, lambda: train(tiny("training.max_steps=4"), finished, resume=tmp_path / "gone"))


def test_a_locked_directory_is_refused(tiny, finished):
    with RunDirectory.open(finished):
        refused(finished, ResourceError, lambda: train(tiny("training.max_steps=4"), finished))


def test_an_interrupt_while_the_data_is_read_is_nothing_that_happened_to_the_run(tiny, finished, monkeypatch):
    def interrupted(experiment):
        raise KeyboardInterrupt

    monkeypatch.setattr("graft.training.session.prepare", interrupted)
    refused(finished, Interrupted, lambda: train(tiny("training.max_steps=4"), finished))


def test_a_preempted_run_stays_resumable(tiny, tmp_path, inject):
    inject("train.step:2:term")
    with pytest.raises(Preempted):
        train(tiny("training.max_steps=4"), tmp_path / "run")
    refused(tmp_path / "run", DataError, lambda: train(tiny("data.source.path=gone.txt"), tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "preempted"


def test_a_run_whose_last_checkpoint_is_found_damaged_is_no_longer_called_resumable(tiny, tmp_path, inject):
    inject("train.step:2:term")
    with pytest.raises(Preempted):
        train(tiny("training.max_steps=4"), tmp_path / "run")
    (weights,) = (tmp_path / "run" / "checkpoints").glob("step-*/model.safetensors")
    weights.write_bytes(b"")
    with pytest.raises(CheckpointError):
        train(tiny("training.max_steps=4"), tmp_path / "run")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["resumable"], status["exit_code"]) == ("failed", False, 4)


def test_what_fails_after_the_run_was_taken_over_is_its_failure(tiny, finished, monkeypatch):
    def full(run):
        raise ResourceError("the disk is full")

    monkeypatch.setattr("graft.training.hooks.evaluate", full)
    with pytest.raises(ResourceError):
        train(tiny("training.max_steps=4"), finished)
    status = json.loads((finished / "status.json").read_text())
    assert (status["state"], status["resumable"], status["exit_code"]) == ("failed", True, 6)


def test_a_directory_without_a_run_says_why_there_is_none(tiny, tmp_path):
    with pytest.raises(DataError):
        train(tiny("data.source.path=gone.txt"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
