"""Bad numbers: skipped, counted, rolled back, and in the end named."""

from __future__ import annotations

import io
import json

import pytest
import torch

from graft import api
from graft.config.experiment import GuardConfig
from graft.errors import DivergedError
from graft.optimizers.grouped import GroupedOptimizer
from graft.training.guard import Guard, Verdict, first_non_finite, non_finite_parameters
from graft.training.session import Session
from tiny_run import bare_run, lines, random_batch

ONE, NAN, INF = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))


def train(experiment, folder, **options):
    return api.train(experiment, out=folder, stream=io.StringIO(), **options)


def events(folder, kind):
    return [e for e in lines(folder / "events.jsonl") if e["event"] == kind]


@pytest.mark.parametrize(
    ("loss", "norm", "scale", "verdict"),
    [
        (ONE, ONE, None, Verdict.GOOD),
        (NAN, ONE, None, Verdict.NOT_FINITE),
        (ONE, NAN, None, Verdict.NOT_FINITE),
        (INF, ONE, None, Verdict.NOT_FINITE),
        (ONE, -INF, None, Verdict.NOT_FINITE),
        (ONE, INF, 1024.0, Verdict.SCALE_TOO_LARGE),
        (ONE, INF, 1.0, Verdict.NOT_FINITE),
        (NAN, INF, 1024.0, Verdict.NOT_FINITE),
    ],
)
def test_verdicts(loss, norm, scale, verdict):
    assert Guard(GuardConfig()).judge(loss, norm, loss_scale=scale) is verdict


def test_a_streak_ends_with_a_good_step_and_the_scales_search_is_no_part_of_it():
    guard = Guard(GuardConfig(max_consecutive_bad_steps=2))
    guard.judge(NAN, ONE)
    guard.judge(ONE, INF, loss_scale=8.0)
    assert (guard.streak, guard.skipped_steps, guard.scaler_skips, guard.must_roll_back) == (1, 1, 1, False)
    guard.judge(ONE, ONE)
    guard.judge(NAN, ONE)
    assert not guard.must_roll_back
    guard.judge(NAN, ONE)
    assert guard.must_roll_back
    other = Guard(GuardConfig())
    other.load_state_dict(guard.state_dict())
    expected = {"skipped_steps": 3, "scaler_skips": 1, "streak": 2, "rollbacks": 0}
    assert other.state_dict() == guard.state_dict() == expected


@pytest.mark.fault
def test_one_bad_step_is_skipped_counted_and_logged_and_the_run_completes(tiny, tmp_path, inject):  # fault 20
    inject("train.gradient:6:nan")
    run = train(tiny(), tmp_path / "run")
    assert run.step == 12
    assert run.guard.skipped_steps == 1
    (event,) = events(tmp_path / "run", "skipped_step")
    assert (event["step"], event["sample_ids"], event["grad_norm"]) == (6, [20, 21, 22, 23], "NaN")
    metric_lines = [e for e in lines(tmp_path / "run" / "metrics.jsonl") if e["kind"] == "train"]
    assert [e["skipped_steps"] for e in metric_lines] == [0] * 5 + [1] * 7
    assert metric_lines[5]["loss"] is None, "no number is made up for a step that was not taken"
    assert metric_lines[5]["grad_norm"] is None


@pytest.mark.fault
def test_a_streak_goes_back_to_the_last_checkpoint_and_past_its_data(tiny, tmp_path, inject):  # fault 22
    inject("train.gradient:6:nan,train.gradient:7:nan,train.gradient:8:nan")
    run = train(tiny(), tmp_path / "run")
    assert (run.step, run.guard.skipped_steps, run.guard.rollbacks, run.guard.streak) == (12, 3, 1, 0)
    (event,) = events(tmp_path / "run", "rollback")
    assert (event["step"], event["to_step"]) == (8, 4)
    metric_lines = [e for e in lines(tmp_path / "run" / "metrics.jsonl") if e["kind"] == "train"]
    assert [e["step"] for e in metric_lines] == list(range(1, 13)), "no step is in the log twice"
    dropped = lines(tmp_path / "run" / "metrics.dropped.jsonl")
    assert [e["step"] for e in dropped if e["kind"] == "train"] == [5, 6, 7]
    assert run.loader._next_row == 4 * (8 + 8), "steps 5 to 12 use what follows the window that was left"


@pytest.mark.fault
def test_a_streak_that_comes_back_ends_the_run_with_a_diagnosis(tiny, tmp_path, monkeypatch):  # fault 22
    poison(monkeypatch, "layers.1.attention.part", from_forward=10)
    with pytest.raises(DivergedError) as caught:
        train(tiny("evaluation.interval=null"), tmp_path / "run")
    message = str(caught.value)
    assert caught.value.exit_code == 5
    assert "3 steps in a row were not finite after 1 of 1 rollbacks" in message
    assert "layers.1.attention.part (Attention)" in message
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["resumable"]) == ("diverged", 5, False)
    assert f"step {status['step']}: " in message
    assert message in status["reason"]
    last = events(tmp_path / "run", "skipped_step")[-1]
    assert str(last["sample_ids"]) in message


@pytest.mark.fault
def test_without_a_checkpoint_the_run_ends_at_once(tiny, tmp_path, inject):  # fault 22
    inject("train.gradient:*:nan*")
    with pytest.raises(DivergedError, match="no checkpoint exists to go back to"):
        train(tiny("checkpoint.interval=null"), tmp_path / "run")


@pytest.mark.fault
def test_broken_parameters_are_never_saved(tiny, tmp_path, monkeypatch):  # fault 24
    original = GroupedOptimizer.step

    def overflowing(self, *arguments, **options):
        result = original(self, *arguments, **options)
        if self.state[self.param_groups[0]["params"][0]]["step"] == 8:
            self.param_groups[0]["params"][0].data[3, 3] = float("inf")
        return result

    monkeypatch.setattr(GroupedOptimizer, "step", overflowing)
    with pytest.raises(DivergedError, match=r"1 parameters are not finite.*embedding\.weight") as caught:
        train(tiny("evaluation.interval=null"), tmp_path / "run")
    assert caught.value.exit_code == 5
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")) == ["step-00000004"]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "diverged"


def test_no_checkpoint_is_taken_in_the_middle_of_a_streak(tiny, tmp_path, inject):
    inject("train.gradient:8:nan,train.gradient:9:nan")
    train(tiny(), tmp_path / "run")
    assert [e["step"] for e in events(tmp_path / "run", "saved")] == [4, 12]


def poison(monkeypatch, name, *, from_forward):
    """From its ``from_forward``-th call on, the named module of the next session's model puts a NaN into its output."""
    original = Session._build

    def build(self, runtime):
        run = original(self, runtime)
        calls = iter(range(10**6))

        def spoil(module, inputs, output):
            if next(calls) >= from_forward:
                output.y[0, 0, 0] = float("nan")

        run.model.get_submodule(name).register_forward_hook(spoil)
        return run

    monkeypatch.setattr(Session, "_build", build)


def test_the_first_bad_module_is_named_before_those_it_spoils(tiny):
    batch = random_batch(2, 16, seed=1)
    run = bare_run(tiny(), [[batch]])
    assert first_non_finite(run, [batch]) == "it did not happen again when the step was repeated"
    projection = run.model.get_submodule("layers.0.mlp.part.up_proj")
    handle = projection.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    assert "layers.0.mlp.part.up_proj (Dense)" in first_non_finite(run, [batch])
    handle.remove()
    run.model.final_norm.register_full_backward_hook(lambda module, grads, outputs: (grads[0] * float("nan"),))
    assert "all outputs are finite, the gradient of" in first_non_finite(run, [batch])
    assert all(p.grad is None for p in run.model.parameters())
    with torch.no_grad():
        run.model.final_norm.weight[0] = float("nan")
    assert non_finite_parameters(run.model) == ["final_norm.weight"]
    assert first_non_finite(run, [batch]) == "parameter final_norm.weight is not finite (1 parameters are not)"
