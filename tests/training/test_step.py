"""The training step: what it computes, in which order, and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch

from graft.training.guard import Verdict
from graft.training.step import train_step
from tiny_run import bare_run, random_batch, tiny

NO_DROPOUT = (
    "model.blocks.main.0.dropout=0",
    "model.blocks.main.1.dropout=0",
    "model.blocks.main.1.residual_dropout=0",
)


def split(batch, parts):
    """The same rows as several micro-batches, with their own counts of targets."""
    from graft.data.batch import Batch

    size = len(batch.sample_ids) // parts
    pieces = []
    for i in range(parts):
        rows = slice(i * size, (i + 1) * size)
        targets = batch.targets_BT[rows]
        count = int((targets >= 0).sum())
        pieces.append(Batch(batch.input_ids_BT[rows], targets, None, None, count, count, batch.sample_ids[rows]))
    return pieces


def uneven_batch():
    """Rows with very different numbers of targets: a mean of means would be wrong."""
    batch = random_batch(4, 16, seed=1)
    batch.targets_BT[0, 1:] = -100
    batch.targets_BT[2, 5:] = -100
    return split(batch, 1)[0]


def test_one_micro_batch_equals_four(tmp_path):
    batch = uneven_batch()
    experiment = tiny(tmp_path, *NO_DROPOUT)
    runs = [bare_run(experiment, [split(batch, parts)]) for parts in (1, 4)]
    reports = []
    for run in runs:
        run.model.double()
        reports.append(train_step(run))
    assert float(reports[0].loss) == pytest.approx(float(reports[1].loss), rel=1e-12)
    assert float(reports[0].grad_norm) == pytest.approx(float(reports[1].grad_norm), rel=1e-12)
    for (name, p), q in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-9), name


def test_the_step_equals_one_written_out_by_hand(tmp_path):
    """Two steps against plain autograd, clipping written out, and PyTorch's AdamW with the schedule's rate."""
    batches = [split(random_batch(4, 16, seed=s), 2) for s in (1, 2)]
    experiment = tiny(tmp_path, *NO_DROPOUT, "training.max_grad_norm=0.5", "objective.z_loss_coef=0")
    run = bare_run(experiment, batches)
    model = copy.deepcopy(run.model)
    groups = [{**g, "params": []} for g in run.optimizer.param_groups]
    by_id = dict(zip(map(id, run.model.parameters()), model.parameters(), strict=True))
    for group, original in zip(groups, run.optimizer.param_groups, strict=True):
        group["params"] = [by_id[id(p)] for p in original["params"]]
    reference = torch.optim.AdamW(groups, fused=False)
    for step, microbatches in enumerate(batches):
        report = train_step(run)
        logits = torch.cat([model(b.input_ids_BT) for b in microbatches]).flatten(0, 1)
        targets = torch.cat([b.targets_BT for b in microbatches]).flatten()
        loss = torch.nn.functional.cross_entropy(logits, targets)
        reference.zero_grad()
        loss.backward()
        loss = loss.detach()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        assert norm > 0.5, "the test must clip"
        for p in model.parameters():
            p.grad.mul_(0.5 / (norm + 1e-6))
        for group in reference.param_groups:
            group["lr"] = 3e-3 * run.schedule.factor(step) * group["lr_multiplier"]
        reference.step()
        assert float(report.loss) == pytest.approx(float(loss), rel=1e-5)
        assert float(report.grad_norm) == pytest.approx(float(norm), rel=1e-5)
        assert report.learning_rate == 3e-3 * run.schedule.factor(step)
    for p, q in zip(run.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=2e-6)


def test_the_step_counts_and_sums(tmp_path):
    batch = uneven_batch()
    run = bare_run(tiny(tmp_path, *NO_DROPOUT), [split(batch, 2)])
    report = train_step(run)
    assert (run.step, run.tokens, report.step) == (1, 64, 1)
    assert run.window.num_targets == batch.num_targets == 38
    assert float(run.window.sums["ce"]) / 38 == pytest.approx(run.window.means()["loss"])
    assert report.verdict is Verdict.GOOD
    assert all(p.grad is None for p in run.model.parameters())


def test_a_step_without_a_single_target_changes_nothing_but_the_decay(tmp_path):
    batch = random_batch(2, 16, seed=1, ignored=16)
    run = bare_run(tiny(tmp_path, *NO_DROPOUT, "optimizer.weight_decay=0"), [[batch]])
    before = copy.deepcopy(run.model.state_dict())
    report = train_step(run)
    assert report.verdict is Verdict.GOOD
    assert float(report.loss) == 0.0
    assert all(torch.equal(before[name], p) for name, p in run.model.state_dict().items())


def state_bytes(run):
    """Everything an update would touch, copied."""
    return copy.deepcopy((run.model.state_dict(), run.state_dict()["optimizer"]))


def assert_equal_state(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.fault
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_non_finite_gradient_changes_neither_weights_nor_optimizer(tmp_path, inject, optimizer, kind):  # fault 20
    steps = [[random_batch(2, 16, seed=s)] for s in range(4)]
    run = bare_run(tiny(tmp_path, f"optimizer.type={optimizer}", "optimizer.learning_rate=1e-3"), steps)
    train_step(run)
    before = state_bytes(run)
    inject(f"train.gradient:2:{kind}")
    report = train_step(run)
    assert report.verdict is Verdict.NOT_FINITE
    assert_equal_state(state_bytes(run), before)
    assert (run.step, run.guard.skipped_steps, run.guard.streak) == (2, 1, 1)
    window = run.window.num_targets
    assert window == 32, "sums of a skipped step would spoil the means"
    assert train_step(run).verdict is Verdict.GOOD
    assert (run.step, run.guard.skipped_steps, run.guard.streak) == (3, 1, 0)
    with pytest.raises(AssertionError):
        assert_equal_state(state_bytes(run), before)


@pytest.mark.fault
def test_a_non_finite_loss_alone_is_enough(tmp_path):  # fault 20
    run = bare_run(tiny(tmp_path), [[random_batch(2, 16, seed=1)]])
    original = run.objective.loss

    def poisoned(model, batch):
        from dataclasses import replace

        terms = original(model, batch)
        return replace(terms, main=terms.main + float("nan") * terms.main.detach())

    run.objective.loss = poisoned
    before = state_bytes(run)
    assert train_step(run).verdict is Verdict.NOT_FINITE
    assert_equal_state(state_bytes(run), before)


def test_fp16_overflow_is_the_scales_doing_and_counted_apart(tmp_path, inject):
    steps = [[random_batch(2, 16, seed=s)] for s in range(3)]
    run = bare_run(tiny(tmp_path, "precision=fp16"), steps)
    scale = run.precision.loss_scale
    inject("train.gradient:1:inf")
    before = state_bytes(run)
    report = train_step(run)
    assert report.verdict is Verdict.SCALE_TOO_LARGE
    assert_equal_state(state_bytes(run), before)
    assert run.precision.loss_scale == scale / 2
    assert (run.guard.scaler_skips, run.guard.skipped_steps, run.guard.streak) == (1, 0, 0)
