"""A stopped and continued run equals one that was not stopped, bit for bit; what cannot be continued is refused."""

from __future__ import annotations

import io
import json

import pytest
import torch

import graft.training.saving
from graft import api
from graft.errors import CheckpointError, ConfigError, DataError, Preempted
from graft.faults import reset_faults
from tiny_run import assert_same_state, assert_same_weights, lines, write_text

GALORE = (
    "optimizer.type=galore_adamw",
    "optimizer.learning_rate=3e-3",
    "optimizer.rank=4",
    "optimizer.update_proj_gap=2",
)
MUON = ("optimizer.type=muon", "optimizer.learning_rate=3e-3")


def train(experiment, folder, **options):
    return api.train(experiment, out=folder, stream=io.StringIO(), **options)


@pytest.fixture
def stop_at(monkeypatch):
    """SIGTERM to this process at the start of a step."""

    def arm(step):
        reset_faults()
        monkeypatch.setenv("GRAFT_FAULT", f"train.step:{step}:term")

    yield arm
    monkeypatch.delenv("GRAFT_FAULT", raising=False)
    reset_faults()


def train_in_pieces(experiment, folder, stops, stop_at, monkeypatch):
    """Stops at each of the steps and resumes; the generators are disturbed in between, as a new process would."""
    for step in stops:
        stop_at(step)
        with pytest.raises(Preempted):
            train(experiment, folder, resume="auto")
        torch.manual_seed(step)
    monkeypatch.delenv("GRAFT_FAULT")
    return train(experiment, folder, resume="auto")


@pytest.mark.fault
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="adamw-fp32-dropout-accumulation"),
        pytest.param((*MUON, "precision=bf16"), id="muon-bf16"),
        pytest.param((*GALORE, "precision=fp32"), id="galore-fp32"),
        pytest.param(("precision=fp16", "logging.interval=5", "training.micro_batch_size=4"), id="fp16-lines-across"),
        pytest.param(("data.packing={type: best_fit}", "seed=3"), id="best-fit"),
    ],
)
def test_resumed_equals_uninterrupted(tiny, tmp_path, stop_at, monkeypatch, overrides):  # fault 17
    experiment = tiny("training.max_steps=20", *overrides)
    whole = train(experiment, tmp_path / "whole")
    pieces = train_in_pieces(experiment, tmp_path / "pieces", (3, 4, 13), stop_at, monkeypatch)
    assert whole.loader.state_dict()["epoch"] >= 1, "the test must cross the end of an epoch"
    assert pieces.step == whole.step == 20
    assert_same_state(pieces, whole)
    assert lines(tmp_path / "pieces" / "metrics.jsonl") == lines(tmp_path / "whole" / "metrics.jsonl")
    assert pieces.best_loss == whole.best_loss


def test_the_equality_test_sees_a_forgotten_generator(tiny, tmp_path, stop_at, monkeypatch):
    monkeypatch.setattr("graft.training.run.set_rng_state", lambda state: None)
    experiment = tiny("training.max_steps=8")
    whole = train(experiment, tmp_path / "whole")
    pieces = train_in_pieces(experiment, tmp_path / "pieces", (3,), stop_at, monkeypatch)
    with pytest.raises(AssertionError):
        assert_same_state(pieces, whole)


def test_evaluating_and_sampling_leave_no_trace(tiny, tmp_path):
    """However often the held-out loss is measured and texts are drawn, the training is the same."""
    rarely = train(tiny("evaluation.interval=null"), tmp_path / "rarely")
    often = train(tiny("evaluation.interval=1", "logging.samples_interval=1"), tmp_path / "often")
    assert_same_weights(rarely, often)
    assert rarely.score == often.score


def test_a_directory_that_holds_a_run_is_refused_unless_resumed(tiny, tmp_path):
    experiment = tiny("training.max_steps=4")
    first = train(experiment, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"already holds a run \(done at step 4\).*--resume auto"):
        train(experiment, tmp_path / "run")
    again = train(experiment, tmp_path / "run", resume="auto")
    assert again.step == 4
    assert_same_weights(first, again)
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 6, "a finished run trains nothing and logs nothing"


def test_a_run_that_failed_before_its_first_step_is_started_again(tiny, tmp_path):
    with pytest.raises(DataError, match="less than one row"):
        train(tiny("training.max_steps=4", "data.seq_len=50000"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert train(tiny("training.max_steps=4"), tmp_path / "run").step == 4


def test_resume_takes_a_word_or_a_checkpoint(tiny, tmp_path):
    with pytest.raises(ConfigError, match="auto, never or the path"):
        train(tiny(), tmp_path / "run", resume="yes")


def test_a_named_checkpoint_starts_another_directory_or_goes_back_in_its_own(tiny, tmp_path):
    experiment = tiny()
    whole = train(experiment, tmp_path / "run")
    fork = train(experiment, tmp_path / "fork", resume=tmp_path / "run" / "checkpoints" / "step-00000004")
    assert_same_weights(whole, fork)
    assert lines(tmp_path / "fork" / "metrics.jsonl")[0]["step"] == 5
    before = lines(tmp_path / "run" / "metrics.jsonl")
    back = train(experiment, tmp_path / "run", resume=tmp_path / "run" / "checkpoints" / "step-00000008")
    assert_same_weights(whole, back)
    assert lines(tmp_path / "run" / "metrics.jsonl") == before
    assert (tmp_path / "run" / "checkpoints" / "step-00000012.abandoned").is_dir()


@pytest.mark.fault
def test_another_architecture_is_refused_with_every_tensor_that_does_not_fit(tiny, tmp_path):  # fault 30
    train(tiny("training.max_steps=4"), tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    status = (tmp_path / "run" / "status.json").read_text()
    changed = tiny("training.max_steps=4", "model.num_layers=3", "model.blocks.main.1.intermediate_size=48")
    with pytest.raises(CheckpointError) as caught:
        train(changed, tmp_path / "run", resume="auto")
    message = str(caught.value)
    assert "missing: layers.2." in message
    assert "mis-shaped: " in message
    assert "[32, 32], expected [48, 32]" in message
    assert caught.value.exit_code == 4
    assert (tmp_path / "run" / "config.yaml").read_text() == config, "a refused run leaves the directory as it was"
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics
    assert (tmp_path / "run" / "status.json").read_text() == status, "the finished run is still finished"


@pytest.mark.fault
def test_another_learning_rate_wins_and_is_printed_and_logged(tiny, tmp_path):  # fault 31
    train(tiny("training.max_steps=4"), tmp_path / "run")
    stream = io.StringIO()
    changed = tiny("training.max_steps=6", "optimizer.learning_rate=1e-4", "optimizer.betas=[0.8, 0.9]")
    run = api.train(changed, out=tmp_path / "run", resume="auto", stream=stream)
    assert "optimizer.learning_rate: 0.003 -> 0.0001 (the config wins)" in stream.getvalue()
    assert "training.max_steps: 4 -> 6 (the config wins)" in stream.getvalue()
    line = next(e for e in lines(tmp_path / "run" / "metrics.jsonl") if e["step"] == 5)
    assert line["learning_rate"] == pytest.approx(1e-4 * run.schedule.factor(4), rel=1e-12)
    assert all(group["betas"] == (0.8, 0.9) for group in run.optimizer.param_groups)
    (event,) = [e for e in lines(tmp_path / "run" / "events.jsonl") if e["event"] == "config_changed"]
    assert {c["path"]: (c["checkpoint"], c["config"]) for c in event["changes"]} == {
        "optimizer.learning_rate": (0.003, 0.0001),
        "optimizer.betas.0": (0.9, 0.8),
        "optimizer.betas.1": (0.95, 0.9),
        "training.max_steps": (4, 6),
    }


def test_another_kind_of_optimizer_is_refused(tiny, tmp_path):
    train(tiny("training.max_steps=4"), tmp_path / "run")
    with pytest.raises(CheckpointError, match="the optimizer is muon and the checkpoint has the state of adamw"):
        train(tiny("training.max_steps=6", *MUON), tmp_path / "run", resume="auto")


def test_regrouped_parameters_keep_their_own_state(tiny, tmp_path):
    """A new group moves parameters to other places in the optimizer: state follows the name, not the place."""
    first = train(tiny("training.max_steps=4"), tmp_path / "run")
    changed = tiny("training.max_steps=5", "optimizer.groups={mlp: {weight_decay: 0.0}, norm: {lr_multiplier: 2.0}}")
    again = train(changed, tmp_path / "run", resume="auto")
    for name, state in first.state_dict()["optimizer"]["state"].items():
        later = again.state_dict()["optimizer"]["state"][name]
        assert float(state["step"]) == 4
        assert float(later["step"]) == 5
        assert later["exp_avg"].shape == state["exp_avg"].shape
        # one step of decay leaves the old average recognisable
        assert torch.nn.functional.cosine_similarity(later["exp_avg"].flatten(), state["exp_avg"].flatten(), 0) > 0.5


@pytest.mark.fault
def test_other_data_is_refused_unless_allowed(tiny, tmp_path):  # fault 32
    train(tiny("training.max_steps=4"), tmp_path / "run")
    write_text(tmp_path / "text.txt", seed=1)
    changed = tiny("training.max_steps=6")
    with pytest.raises(DataError, match="--allow-data-change") as caught:
        train(changed, tmp_path / "run", resume="auto")
    assert caught.value.exit_code == 3
    run = train(changed, tmp_path / "run", resume="auto", allow_data_change=True)
    assert run.step == 6
    assert run.loader.state_dict() == {"epoch": 0, "index": 8}, "new data is read from its start"
    events = lines(tmp_path / "run" / "events.jsonl")
    assert any("reading the data from its start" in e.get("text", "") for e in events)


@pytest.mark.parametrize("override", ["data.seq_len=16", "data.packing={type: best_fit}", "seed=7"])
def test_another_order_of_rows_starts_from_its_beginning(tiny, tmp_path, override):
    train(tiny("training.max_steps=4"), tmp_path / "run")
    run = train(tiny("training.max_steps=6", override), tmp_path / "run", resume="auto")
    assert run.loader.state_dict() == {"epoch": 0, "index": 8}


@pytest.mark.fault
def test_another_number_of_threads_is_said_to_break_equality(tiny, tmp_path, monkeypatch):  # fault 29
    train(tiny("training.max_steps=4"), tmp_path / "run")
    actual = graft.training.saving.machine()
    monkeypatch.setattr("graft.training.resume.machine", lambda: {**actual, "threads": 7, "torch": "9.9"})
    stream = io.StringIO()
    api.train(tiny("training.max_steps=5"), out=tmp_path / "run", resume="auto", stream=stream)
    assert f"not bit-exact from here on: torch {actual['torch']} -> 9.9, threads 1 -> 7" in stream.getvalue()


def test_the_checkpoint_with_the_lowest_held_out_loss_is_kept_beside_the_last(tiny, tmp_path, monkeypatch):
    losses = iter([1.0, 4.0, 2.0, 3.0, 5.0])  # the first is the untrained model's, which is no candidate
    monkeypatch.setattr("graft.training.hooks.evaluate", lambda run: {"loss": next(losses), "bpb": None})
    overrides = ("training.max_steps=8", "checkpoint.interval=2", "evaluation.interval=2", "checkpoint.keep_last=1")
    run = train(tiny(*overrides), tmp_path / "run")
    assert run.best_loss == 2.0
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == ["step-00000004", "step-00000008"]


def test_a_save_without_an_evaluation_of_the_same_step_has_no_score(tiny, tmp_path):
    train(tiny("checkpoint.interval=3"), tmp_path / "run")
    scores = {}
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        data = json.loads(manifest.read_text())
        scores[data["step"]] = data["score"] is not None
    assert scores == {3: False, 6: False, 9: False, 12: True}
