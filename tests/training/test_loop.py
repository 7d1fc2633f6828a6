"""The loop around the step: hooks at their steps, numbers in the log, and an honest end."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch

from graft import api
from graft.data.loader import validation_batches
from graft.errors import GraftError, ResourceError
from graft.training.evaluate import evaluate
from graft.training.memory import out_of_memory, smaller_micro_batch
from graft.training.session import Options, train_run
from graft.training.throughput import Stopwatch, flops_per_token
from tiny_run import assert_same_state, bare_run, lines, random_batch


def train(experiment, folder, **options):
    return api.train(experiment, out=folder, stream=io.StringIO(), **options)


def status(folder):
    return json.loads((folder / "status.json").read_text())


def test_a_run_leaves_everything_in_its_directory(tiny, tmp_path):
    stream = io.StringIO()
    experiment = tiny("logging.interval=5", "logging.samples_interval=6")
    run = api.train(experiment, out=tmp_path / "run", stream=stream, config_text="# mine\n")
    folder = tmp_path / "run"
    assert run.directory == folder
    assert (folder / "config.yaml").read_text() == "# mine\n"
    assert api.load(folder / "config.resolved.yaml") == experiment
    assert json.loads((folder / "env.json").read_text())["runtime"]["device"] == "cpu"
    assert {**status(folder), "time": 0, "pid": 0, "host": ""} == {
        "state": "done", "step": 12, "reason": "", "resumable": False, "exit_code": 0, "time": 0, "pid": 0, "host": "",
    }  # fmt: skip
    assert (folder / "train.log").read_text() == stream.getvalue()
    for text in ("parameters, 12 steps of 128 tokens", "data fingerprint", "embedding", "weight decay 0.1"):
        assert text in stream.getvalue()
    from graft.data.tokenizers.base import load_tokenizer

    assert load_tokenizer(folder / "tokenizer").vocab_size == 257
    found = lines(folder / "metrics.jsonl")
    assert [(e["kind"], e["step"]) for e in found] == [
        ("eval", 0), ("eval", 4), ("train", 5), ("eval", 8), ("train", 10), ("train", 12), ("eval", 12),
    ]  # fmt: skip
    samples = [e for e in lines(folder / "events.jsonl") if e["event"] == "samples"]
    assert [(e["step"], len(e["texts"])) for e in samples] == [(6, 3), (12, 3)]
    assert "--- sample at step 12 ---" in stream.getvalue()


def test_a_held_out_share_that_is_far_off_is_said_once_when_training_starts(tiny, tmp_path):
    stream = io.StringIO()
    api.train(tiny("training.max_steps=2", "data.validation.fraction=0.001"), out=tmp_path / "run", stream=stream)
    assert stream.getvalue().count("warning: data.validation.fraction: 0.001 of the text was to be held out") == 1


def test_the_last_thing_a_finished_run_does_is_what_it_was_asked_to(tiny, tmp_path):
    seen = []

    def finish(folder):
        seen.append((folder, sorted(p.name for p in folder.glob("checkpoints/step-*"))[-1]))

    train_run(tiny(), Options(out=tmp_path / "run", stream=io.StringIO(), finish=finish))
    assert seen == [(tmp_path / "run", "step-00000012")]


def test_metric_lines_say_what_was_trained(tiny, tmp_path):
    run = train(tiny("logging.interval=4", "training.max_steps=8"), tmp_path / "run")
    (first, second) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
                       if '"train"' in line)  # fmt: skip
    assert (first["step"], first["tokens"]) == (4, 4 * 4 * 32)
    assert second["learning_rate"] == 3e-3 * run.schedule.factor(7)
    assert 3.0 < second["loss"] < first["loss"] < 1.1 * math.log(257)
    assert first["perplexity"] == pytest.approx(math.exp(first["loss"]))
    time = first["time"]
    assert set(time) == {"tokens_per_second", "mfu", "memory_bytes", "seconds", "seconds_left"}
    assert 0.0 < time["mfu"] < 1.0
    assert time["memory_bytes"] > 2**20
    assert second["time"]["seconds_left"] == 0.0


def test_the_line_averages_over_the_steps_since_the_last(tiny, tmp_path):
    every = train(tiny("training.max_steps=4"), tmp_path / "every")
    once = train(tiny("training.max_steps=4", "logging.interval=4"), tmp_path / "once")
    singles = [e for e in lines(tmp_path / "every" / "metrics.jsonl") if e["kind"] == "train"]
    (mean,) = [e for e in lines(tmp_path / "once" / "metrics.jsonl") if e["kind"] == "train"]
    once.loader.load_state_dict({"epoch": 0, "index": 0})
    counts = [sum(batch.num_targets for batch in once.loader.next_step()) for _ in range(4)]
    assert len(set(counts)) > 1, "with equal steps a mean of means would do"
    nats = sum(line["loss"] * count for line, count in zip(singles, counts, strict=True))
    assert mean["loss"] == pytest.approx(nats / sum(counts), rel=1e-12)
    assert every.score == once.score


def test_held_out_loss_is_plain_cross_entropy_over_the_held_out_rows(tiny, tmp_path):
    run = train(tiny("objective.z_loss_coef=0.1"), tmp_path / "run")
    nats, targets, num_bytes = 0.0, 0, 0
    run.model.eval()
    for batch in validation_batches(run.prepared, run.experiment):
        logits = run.model(batch.input_ids_BT, positions_BT=batch.positions_BT, segment_ids_BT=batch.segment_ids_BT)
        with torch.no_grad():
            nats += float(torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="sum", ignore_index=-100
            ))  # fmt: skip
        targets += batch.num_targets
        num_bytes += batch.num_bytes
    step, numbers = run.last_evaluation
    assert step == 12
    assert numbers["num_targets"] == targets > 0
    assert numbers["loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert numbers["bpb"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    run.model.train()
    assert evaluate(run) == numbers, "the same rows, and no dropout, every time"
    assert run.model.training


def test_flops_of_a_step_are_those_pytorch_counts(tiny):
    """PyTorch's counter over forward and backward counts whole attention squares, we count the pairs that are seen."""
    from torch.utils.flop_counter import FlopCounterMode

    rows, seq_len, heads, head_dim, layers = 3, 32, 2, 16, 2
    experiment = tiny("model.blocks.main.0.dropout=0", "runtime.kernels=reference", "objective.z_loss_coef=0")
    run = bare_run(experiment, [])
    run.model.set_runtime(kernels="reference")
    batch = random_batch(rows, seq_len, seed=0)
    with FlopCounterMode(display=False) as counter:
        run.loss(batch).main.backward()
    pairs_all, pairs_seen = seq_len**2, seq_len * (seq_len + 1) // 2
    unseen = 3 * rows * layers * 4 * heads * head_dim * (pairs_all - pairs_seen)
    counted = counter.get_total_flops() - unseen
    assert flops_per_token(run.model, seq_len) * rows * seq_len == pytest.approx(counted, rel=1e-6)


def test_looped_layers_are_counted_once_per_loop(tiny):
    once, thrice = (bare_run(tiny(f"model.loops={n}"), []).model for n in (1, 3))
    head = 3 * 2 * 257 * 32
    assert flops_per_token(thrice, 32) - head == pytest.approx(3 * (flops_per_token(once, 32) - head))


def test_the_stopwatch_starts_over_when_read():
    watch = Stopwatch()
    watch.add(0.5, 100)
    watch.add(1.5, 100)
    assert watch.read() == (100.0, 1.0)
    watch.add(1.0, 10)
    assert watch.read() == (10.0, 1.0)


# ---------------------------------------------------------------------- the end


@pytest.mark.fault
def test_memory_that_runs_out_is_explained(tiny, tmp_path, monkeypatch):  # fault 42
    monkeypatch.setattr(
        "graft.objectives.causal_lm.CausalLM.loss", lambda self, model, batch: torch.empty(2**50, dtype=torch.float64)
    )
    with pytest.raises(ResourceError) as caught:
        train(tiny("training.global_batch_size=12", "training.micro_batch_size=6"), tmp_path / "run")
    message = str(caught.value)
    assert "out of memory when 9007199254740992 bytes more were asked for" in message
    assert "micro-batches of 6 sequences of 32 tokens" in message
    assert "training.micro_batch_size: 4 (the global batch stays as it is)" in message
    assert caught.value.exit_code == 6
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["exit_code"]) == ("failed", 6)


def test_what_to_do_when_memory_runs_out_depends_on_the_config(tiny):
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has …")
    message = str(out_of_memory(cuda, tiny("training.micro_batch_size=1")))
    assert "2.50 GiB" in message
    assert "shorten data.seq_len" in message
    assert "activation_checkpointing: block" in message
    assert "activation_checkpointing" not in str(out_of_memory(cuda, tiny("runtime.activation_checkpointing=block")))
    assert out_of_memory(MemoryError(), tiny()) is not None
    assert out_of_memory(RuntimeError("shape mismatch"), tiny()) is None
    sizes = {(12, 12): 6, (12, 6): 4, (12, 4): 3, (12, 1): None, (7, 7): 1}
    for (total, micro), smaller in sizes.items():
        config = tiny(f"training.global_batch_size={total}", f"training.micro_batch_size={micro}")
        assert smaller_micro_batch(config) == smaller


def test_a_bug_is_not_dressed_up_but_the_status_tells(tiny, tmp_path, monkeypatch):
    def bug(self, model, batch):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("graft.objectives.causal_lm.CausalLM.loss", bug)
    with pytest.raises(ZeroDivisionError):
        train(tiny(), tmp_path / "run")
    found = status(tmp_path / "run")
    assert (found["state"], found["reason"], found["exit_code"]) == ("failed", "ZeroDivisionError: oops", 1)


@pytest.mark.fault
@pytest.mark.parametrize("place", ["missing", "readonly"])
def test_a_place_that_cannot_be_written_is_found_before_the_first_step(tiny, tmp_path, monkeypatch, place):  # fault 16
    monkeypatch.setattr("graft.training.session.prepare", lambda *a, **k: pytest.fail("too late"))
    folder = tmp_path / "no" / "such" / "place" if place == "missing" else _file(tmp_path) / "run"
    with pytest.raises(GraftError) as caught:
        train(tiny(), folder)
    assert caught.value.exit_code == 6


def _file(folder):
    """A parent nothing can be made in, for root too."""
    path = folder / "file"
    path.write_text("")
    return path


@pytest.mark.fault
def test_trackers_that_fail_leave_the_training_alone(tiny, tmp_path, monkeypatch):  # fault 46
    import wandb

    def down(*arguments, **options):
        raise ConnectionError("server down")

    plain = train(tiny(), tmp_path / "plain")
    monkeypatch.setattr(wandb, "init", down)
    stream = io.StringIO()
    tracked = api.train(tiny("logging.wandb={}"), out=tmp_path / "tracked", stream=stream)
    assert_same_state(plain, tracked)
    assert lines(tmp_path / "plain" / "metrics.jsonl") == lines(tmp_path / "tracked" / "metrics.jsonl")
    assert stream.getvalue().count("Weights & Biases failed") == 1


def test_trackers_get_every_number(tiny, tmp_path):
    train(tiny("logging.tensorboard=true", "training.max_steps=2"), tmp_path / "run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"train/loss", "train/learning_rate", "train/time/tokens_per_second", "eval/bpb"} <= {
        *scalars.Tags()["scalars"]
    }
    logged = [e["loss"] for e in lines(tmp_path / "run" / "metrics.jsonl") if e["kind"] == "train"]
    assert [s.value for s in scalars.Scalars("train/loss")] == pytest.approx(logged)
