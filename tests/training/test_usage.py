"""What is chosen: the figures by brute force, the lines of a run, and that nothing is counted twice or forgotten."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.distributed as dist

from graft import api
from graft.errors import Preempted
from graft.training.step import train_step
from graft.training.usage import UsageMemory, coverage, dead, entropy, gini, hot, summed_over_ranks
from tiny_run import assert_same_state, bare_run, lines, random_batch

MOE = (
    "model.blocks.main.1={type: moe, num_experts: 4, num_experts_per_tok: 2, intermediate_size: 16, "
    "balance_bias_rate: 0.01}",
    "model.blocks.main.0.dropout=0",
)
QUIET = ("model.blocks.main.0.residual_dropout=0",)
LOUD_BIAS = "model.blocks.main.1.balance_bias_rate=0.5"
FIRST = "layers.0.moe.experts"
BIAS = "layers.0.moe.part.router.balance_bias"


def train(experiment, folder, **options):
    return api.train(experiment, out=folder, stream=io.StringIO(), **options)


# ---------------------------------------------------------------------- figures


@pytest.mark.parametrize("counts", [[3, 0, 5, 1, 0, 40], [7], [0, 0, 9], [2, 2, 2, 2]], ids=str)
def test_figures_by_brute_force(counts):
    given, total, n = torch.tensor(counts), sum(counts), len(counts)
    assert coverage(given) == sum(c > 0 for c in counts) / n
    assert hot(given, 2.0) == sum(c > 2 * total / n for c in counts)
    shares = [c / total for c in counts if c]
    expected = -sum(p * math.log(p) for p in shares) / math.log(n) if n > 1 else 1.0
    assert entropy(given) == pytest.approx(expected, abs=1e-12)
    differences = sum(abs(a - b) for a in counts for b in counts)
    assert gini(given) == pytest.approx(differences / (2 * n * total), abs=1e-12)


def test_extremes():
    even, single = torch.full((8,), 3), torch.tensor([0] * 7 + [5])
    assert (entropy(even), entropy(single)) == (pytest.approx(1.0), 0.0)
    assert (gini(even), gini(single)) == (0.0, 1 - 1 / 8)
    assert hot(single, 5.0) == 1
    assert hot(even, 1.0) == 0, "more than the mean, not as much as it"


def test_dead_since():
    last = torch.tensor([0, 3, 9, 10])
    assert [dead(last, 10, after) for after in (1, 2, 7, 8, 10, 11)] == [3, 2, 2, 1, 1, 0]


def test_memory_counts_between_looks_and_remembers_beyond_them():
    memory = UsageMemory()
    memory.add(1, {"a": torch.tensor([2, 0, 1])})
    memory.add(2, {"a": torch.tensor([1, 0, 0])})
    summary = memory.summary("a", 2, hot_threshold=1.5, dead_after=2)
    assert (summary["items"], summary["chosen"], summary["hot"], summary["dead"]) == (3, 4, 1, 1)
    memory.forget_counts()
    memory.add(3, {"a": torch.tensor([0, 1, 0])})
    summary = memory.summary("a", 3, hot_threshold=1.5, dead_after=2)
    assert (summary["chosen"], summary["coverage"], summary["dead"]) == (1, pytest.approx(1 / 3), 1)
    memory.forget_counts()
    idle = memory.summary("a", 9, hot_threshold=1.5, dead_after=7)
    assert (idle["chosen"], idle["coverage"], idle["entropy"], idle["gini"], idle["dead"]) == (0, None, None, None, 2)
    again = UsageMemory()
    again.load_state_dict(copy.deepcopy(memory.state_dict()), torch.device("cpu"))
    again.add(9, {"a": torch.tensor([0, 0, 1])})
    assert again.last_chosen["a"].tolist() == [2, 3, 9]
    assert memory.last_chosen["a"].tolist() == [2, 3, 1]


# ---------------------------------------------------------------------- the step


def test_bias_after_two_micro_batches_is_the_bias_after_one(tiny):
    whole = random_batch(4, 32, seed=1)
    halves = [random_batch(2, 32, seed=s) for s in (0, 1)]
    for i, half in enumerate(halves):
        half.input_ids_BT.copy_(whole.input_ids_BT[2 * i : 2 * i + 2])
    runs = [bare_run(tiny(*MOE), [batches]) for batches in ([whole], halves)]
    for run in runs:
        run.model.double().train()
        train_step(run)
    one, two = (run.model.state_dict()[BIAS] for run in runs)
    assert one.any()
    assert torch.equal(one, two)
    counts = runs[0].usage.counts[FIRST]
    assert torch.equal(counts, runs[1].usage.counts[FIRST])
    assert counts.sum() == 4 * 32 * 2
    assert torch.equal(one, 0.01 * (counts.double().mean() - counts).sign())


@pytest.mark.parametrize("loops", [1, 2])
def test_recomputation_does_not_count_twice(tiny, loops):
    batch = random_batch(2, 32, seed=1)
    runs = [bare_run(tiny(*MOE, f"model.loops={loops}"), [[batch]]) for _ in range(2)]
    runs[1].model.set_runtime(activation_checkpointing="block")
    for run in runs:
        run.model.train()
        train_step(run)
        assert run.usage.counts[FIRST].sum() == loops * 2 * 32 * 2
    assert torch.equal(runs[0].model.state_dict()[BIAS], runs[1].model.state_dict()[BIAS])


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
def test_compiled_steps_count_and_balance_alike(tiny):
    """The bias that an update moved is the one the next compiled step reads, recomputed or not."""
    steps = [[random_batch(2, 32, seed=s)] for s in range(3)]
    runs = [bare_run(tiny(*MOE, *QUIET, LOUD_BIAS), steps) for _ in range(3)]
    runs[1].model.set_runtime(compile=True)
    runs[2].model.set_runtime(compile=True, activation_checkpointing="block")
    for run in runs:
        run.model.double().train()
        for _ in steps:
            train_step(run)
    eager, *compiled = [run.usage.counts[FIRST] for run in runs]
    assert eager.sum() == 3 * 2 * 32 * 2
    for run, counts in zip(runs[1:], compiled, strict=True):
        assert torch.equal(counts, eager)
        assert torch.equal(run.model.state_dict()[BIAS], runs[0].model.state_dict()[BIAS])


def test_a_skipped_step_moves_no_bias_and_counts_nothing(tiny, inject):
    run = bare_run(tiny(*MOE), [[random_batch(2, 32, seed=s)] for s in (1, 2)])
    run.model.train()
    train_step(run)
    before = copy.deepcopy((run.model.state_dict(), run.usage.state_dict()))
    inject("train.gradient:2:nan")
    train_step(run)
    torch.testing.assert_close((run.model.state_dict(), run.usage.state_dict()), before, rtol=0, atol=0)


def test_evaluation_counts_nothing(tiny):
    run = bare_run(tiny(*MOE), [[random_batch(2, 32, seed=1)]])
    run.model.eval()
    assert run.loss(random_batch(2, 32, seed=1)).usage == {}


# ---------------------------------------------------------------------- the run


def usage_lines(folder):
    return [line for line in lines(folder / "metrics.jsonl") if line["kind"] == "usage"]


def test_lines_of_a_run(tiny, tmp_path):
    """Two layers, two lines each: every five of twelve steps and at the end."""
    run = train(tiny(*MOE, "logging.usage_interval=5", "logging.dead_after=3"), tmp_path / "run")
    found = usage_lines(tmp_path / "run")
    assert [(line["step"], line["of"]) for line in found] == [
        (step, f"layers.{layer}.moe.experts") for step in (5, 10, 12) for layer in (0, 1)
    ]
    assert [line["chosen"] for line in found[::2]] == [steps * 4 * 32 * 2 for steps in (5, 5, 2)]
    for line in found:
        assert line["items"] == 4
        assert 0 < line["coverage"] <= 1
        assert 0 <= line["gini"] < 1
    assert run.usage.counts == {}


def test_a_model_that_chooses_nothing_has_no_lines(tiny, tmp_path):
    train(tiny("logging.usage_interval=1"), tmp_path / "run")
    assert not usage_lines(tmp_path / "run")


def test_trackers_get_every_layer(tiny, tmp_path, monkeypatch):
    seen = {}

    class Memory:
        name = "Memory"

        def log(self, step, numbers):
            seen.setdefault(step, {}).update(numbers)

        def close(self):
            pass

    monkeypatch.setattr("graft.training.trackers.TensorBoardTracker", lambda folder: Memory())
    monkeypatch.setattr("graft.training.trackers.TensorBoardTracker.name", "Memory", raising=False)
    train(tiny(*MOE, "logging.tensorboard=true"), tmp_path / "run")
    by_layer = {line["of"]: line for line in usage_lines(tmp_path / "run")}
    assert len(by_layer) == 2
    for name, line in by_layer.items():
        assert seen[12][f"usage/{name}/coverage"] == line["coverage"]
        assert seen[12][f"usage/{name}/dead"] == line["dead"]
    assert "train/loss" in seen[12]


@pytest.mark.fault
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="adamw-fp32"),
        pytest.param(("optimizer.type=muon", "optimizer.learning_rate=3e-3", "precision=bf16"), id="muon-bf16"),
    ],
)
def test_resumed_equals_uninterrupted(tiny, tmp_path, inject, monkeypatch, overrides):  # fault 17
    """Weights, biases, counts and lines, stopped in the middle of a window."""
    odd = "training.max_steps=13"  # so that steps up and down cannot cancel
    experiment = tiny(*MOE, odd, "logging.usage_interval=5", "logging.dead_after=2", *overrides)
    whole = train(experiment, tmp_path / "whole")
    for step in (3, 8):
        inject(f"train.step:{step}:term")
        with pytest.raises(Preempted):
            train(experiment, tmp_path / "pieces", resume="auto")
    monkeypatch.delenv("GRAFT_FAULT")
    pieces = train(experiment, tmp_path / "pieces", resume="auto")
    assert whole.model.state_dict()[BIAS].any()
    assert_same_state(pieces, whole)
    assert len(usage_lines(tmp_path / "whole")) == 6
    assert lines(tmp_path / "pieces" / "metrics.jsonl") == lines(tmp_path / "whole" / "metrics.jsonl")


def test_moments_are_no_counts():
    memory = UsageMemory()
    memory.add(1, {"experts": torch.tensor([1, 0]), "query_moments": torch.ones(3, 2)})
    assert list(memory.names()) == ["experts"]


# ---------------------------------------------------------------------- several processes


def test_one_process_keeps_its_counts():
    usage = {"a": torch.tensor([1, 2])}
    assert summed_over_ranks(usage)["a"] is usage["a"]


def rank_of_two(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        usage = {
            "a": torch.tensor([1, 2]) + 10 * rank,
            "moments": torch.tensor([[0.5 * rank]]),
            "b": torch.tensor([5 * rank]),
        }
        summed = summed_over_ranks(usage)
        assert list(summed) == list(usage)
        assert (summed["a"].dtype, summed["moments"].tolist()) == (torch.int64, [[0.5]])
        assert summed["a"].tolist() == [12, 14]
        assert summed["b"].tolist() == [5]
        assert usage["a"].tolist() == [1 + 10 * rank, 2 + 10 * rank]
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_counts_of_two_processes_add_up(tmp_path):
    torch.multiprocessing.spawn(rank_of_two, args=(str(tmp_path),), nprocs=2)
