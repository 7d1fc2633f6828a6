"""Row gradients through the whole step: sums, norm, clipping, guard, loss scale, checkpoints."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from graft import api
from graft.errors import CheckpointError, Preempted
from graft.ops.row_gradients import rows_only
from graft.training.gradients import ROW_BY_ROW_FROM, global_norm, gradient_values, scale_to_norm
from graft.training.guard import Verdict, first_non_finite
from graft.training.step import train_step
from tiny_run import assert_same_state, assert_same_weights, bare_run, lines, random_batch

PEER = (
    "model.blocks.main.0.dropout=0",
    "model.blocks.main.1={type: peer, product_key_dims: [16, 16], num_experts_per_tok: 4, num_heads: 2, query_dim: 16}",
    "evaluation.interval=null",
)
TABLES = ("expert_down", "expert_up")


def by_row(update: str, **more: Any) -> str:
    fields = "".join(f", {key}: {value}" for key, value in more.items())
    return f"optimizer.groups={{expert_table: {{update: {update}{fields}}}}}"


BOTH = pytest.mark.parametrize("update", ["rowwise_adagrad", "rowwise_adam"])


def tables(run) -> dict[str, torch.Tensor]:
    return {name: p for name, p in run.model.named_parameters() if name.endswith(TABLES)}


def gradients(run) -> torch.Tensor:
    """One step's backward passes, up to and including the norm."""
    batches = run.next_microbatches()
    for batch in batches:
        terms = run.loss(batch)
        run.backward(terms.main / sum(b.num_targets for b in batches))
    return run.gradient_norm()


def test_a_tied_tables_look_ups_are_kept_apart_and_added_to_the_heads_gradient(tiny):
    steps = [[random_batch(2, 16, seed=s) for s in (1, 2)]]
    experiment = tiny("model.head.tie_word_embeddings=true", *PEER[:2])  # without dropout
    run, plain = bare_run(experiment, steps), bare_run(experiment, steps)
    plain.look_ups = None
    kept = []
    table, expected = run.model.embedding.weight, plain.model.embedding.weight
    run.model.embedding.register_forward_hook(lambda *a: kept.append(a[0].weight.apart))
    norms = [gradients(each) for each in (run, plain)]
    assert all(each.grad.is_sparse for each in kept), "both micro-batches were looked up apart"
    assert not hasattr(table, "apart"), "only while the run computes its loss"
    assert table.grad.layout == torch.strided
    assert torch.allclose(table.grad, expected.grad, rtol=1e-5, atol=1e-8)
    assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-6)


def test_a_tied_table_whose_head_is_left_alone_gets_a_dense_gradient(tiny):
    run = bare_run(tiny("model.head.tie_word_embeddings=true"), [[random_batch(2, 16, seed=0)]])
    ids_BT = run.next_microbatches()[0].input_ids_BT
    with run.look_ups.during():
        squares = run.model.features(ids_BT).x_BTD.square().sum()
    run.backward(squares)
    table = run.model.embedding.weight
    assert table.grad.layout == torch.strided
    seen = torch.zeros(len(table), dtype=torch.bool).index_fill(0, ids_BT.flatten(), True)
    assert table.grad[seen].abs().sum() > 0
    assert table.grad[~seen].abs().sum() == 0


def test_a_tied_model_out_of_training_has_all_its_gradients(tiny):
    run = bare_run(tiny("model.head.tie_word_embeddings=true"), [[random_batch(2, 16, seed=0)]])
    table = run.model.embedding.weight
    ids_BT = run.next_microbatches()[0].input_ids_BT
    run.model.features(ids_BT).x_BTD.square().sum().backward()
    assert table.grad[ids_BT.flatten()].abs().sum() > 0


def test_an_untied_tables_gradient_is_dense_from_the_start(tiny):
    run = bare_run(tiny("model.head.tie_word_embeddings=false"), [[random_batch(2, 16, seed=0)]])
    assert run.look_ups is None
    gradients(run)
    assert not run.model.embedding.weight.grad.is_sparse


def test_a_large_gradients_norm_is_that_of_all_its_numbers():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(ROW_BY_ROW_FROM // 64, 64, generator=generator), torch.randn(7, generator=generator)]
    whole = torch.cat([v.flatten() for v in values]).double().norm()
    assert float(global_norm(values)) == pytest.approx(float(whole), rel=1e-6)
    values[0][3, 5] = float("nan")
    assert not torch.isfinite(global_norm(values))


def test_norm_and_clipping_are_those_of_dense_gradients(tiny):
    steps = [[random_batch(2, 16, seed=s) for s in (1, 2)]]
    dense, rows = (
        bare_run(tiny(*PEER, "training.max_grad_norm=0.1", *o), steps) for o in ((), (by_row("rowwise_adam"),))
    )
    norms = [gradients(run) for run in (dense, rows)]
    assert float(norms[0]) > 0.2, "the test must clip"
    assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-6)
    assert all(p.grad.is_sparse and p.grad.is_coalesced() for p in tables(rows).values())
    for run, norm in zip((dense, rows), norms, strict=True):
        run._clip(norm)
    for (name, p), q in zip(dense.model.named_parameters(), rows.model.parameters(), strict=True):
        torch.testing.assert_close(q.grad.to_dense(), p.grad, rtol=1e-5, atol=1e-8, msg=name)
    clipped = torch.stack([v.square().sum() for v in gradient_values(rows.parameters)]).sum().sqrt()
    assert float(clipped) == pytest.approx(0.1, rel=1e-4)


def test_loops_and_recomputed_blocks_add_up(tiny):
    """A table that is read twice in one forward pass, in blocks that are computed again in the backward pass."""
    steps = [[random_batch(2, 16, seed=1)]]
    options = (*PEER, "model.loops=2", "model.blocks.main.1.expert_hidden_size=2")
    dense, rows = (bare_run(tiny(*options, *more), steps) for more in ((), (by_row("rowwise_adam"),)))
    rows.model.set_runtime(activation_checkpointing="block")
    assert float(gradients(dense)) == pytest.approx(float(gradients(rows)), rel=1e-6)
    for (name, p), q in zip(tables(dense).items(), tables(rows).values(), strict=True):
        torch.testing.assert_close(q.grad.to_dense(), p.grad, rtol=1e-5, atol=1e-8, msg=name)


def test_scaling_leaves_small_gradients_alone():
    table = torch.nn.Parameter(torch.zeros(5, 2))
    table.grad = rows_only(torch.tensor([1, 4]), torch.tensor([[3.0, 0.0], [0.0, 4.0]]), 5)
    values = gradient_values([table, torch.nn.Parameter(torch.zeros(1))])
    scale_to_norm(values, 10.0, torch.tensor(5.0))
    assert table.grad.to_dense().norm() == 5.0
    scale_to_norm(values, 1.0, torch.tensor(5.0))
    assert float(table.grad.to_dense().norm()) == pytest.approx(1.0)


@BOTH
def test_one_micro_batch_equals_two(tiny, update):
    batches = [random_batch(2, 16, seed=s) for s in (1, 2)]
    whole = random_batch(2, 16, seed=1)
    joined = type(whole)(
        torch.cat([b.input_ids_BT for b in batches]),
        torch.cat([b.targets_BT for b in batches]),
        None,
        None,
        sum(b.num_targets for b in batches),
        sum(b.num_bytes for b in batches),
        (0, 1, 2, 3),
    )
    runs = [bare_run(tiny(*PEER, by_row(update, eps=1e-3)), [step]) for step in ([joined], batches)]
    for run in runs:
        run.model.double()
        for _ in range(2):
            train_step(run)
    for (name, p), q in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9, msg=name)


def test_a_step_equals_adagrad_on_the_rows_of_the_dense_gradient(tiny):
    """Two steps by hand from dense gradients: used rows by the formula, all others bit for bit."""
    steps = [[random_batch(1, 8, seed=s)] for s in (1, 2)]
    overrides = (*PEER, "training.max_grad_norm=null", "schedule={type: constant}")
    run = bare_run(tiny(*overrides, by_row("rowwise_adagrad", eps=1e-3, lr_multiplier=2)), steps)
    state = {name: torch.zeros(256) for name in tables(run)}
    for _ in range(2):
        twin = bare_run(tiny(*overrides), steps)
        twin.loader.index = run.loader.index
        twin.model.load_state_dict(copy.deepcopy(run.model.state_dict()))
        gradients(twin)
        train_step(run)
        for name, table in tables(twin).items():
            used = table.grad.abs().amax(1) > 0
            assert 0 < used.sum() < 256
            state[name] += table.grad.square().mean(1)
            expected = table - 2 * 3e-3 * table.grad / (state[name].sqrt() + 1e-3)[:, None]
            found = run.model.get_parameter(name)
            torch.testing.assert_close(found[used], expected[used], rtol=0, atol=1e-6)
            assert torch.equal(found[~used], table[~used])
            assert torch.equal(run.optimizer.state[found]["row_sum"] > 0, state[name] > 0)


@pytest.mark.fault
@BOTH
@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_non_finite_gradient_changes_neither_tables_nor_their_state(tiny, inject, update, kind):  # fault 20
    steps = [[random_batch(2, 16, seed=s)] for s in range(3)]
    run = bare_run(tiny(*PEER, by_row(update)), steps)
    train_step(run)
    before = copy.deepcopy((run.model.state_dict(), run.state_dict()["optimizer"]))
    original = run.precision.unscale

    def poisoned(optimizer):
        for table in tables(run).values():
            table.grad._values()[0, 0] = float(kind)
        original(optimizer)

    run.precision.unscale = poisoned
    assert train_step(run).verdict is Verdict.NOT_FINITE
    torch.testing.assert_close((run.model.state_dict(), run.state_dict()["optimizer"]), before, rtol=0, atol=0)
    run.precision.unscale = original
    assert train_step(run).verdict is Verdict.GOOD


def test_the_diagnosis_names_a_table(tiny):
    run = bare_run(tiny(*PEER, by_row("rowwise_adam")), [[random_batch(2, 16, seed=1)]])
    name, table = next(iter(tables(run).items()))
    table.register_hook(lambda gradient: gradient * float("nan"))
    assert first_non_finite(run, run.next_microbatches()) == f"all outputs are finite, the gradient of {name} is not"


def test_fp16_unscales_row_gradients(tiny):
    norms = {}
    for precision in ("fp32", "fp16"):
        run = bare_run(tiny(*PEER, by_row("rowwise_adam"), f"precision={precision}"), [[random_batch(2, 16, seed=1)]])
        norms[precision] = float(gradients(run))
        values = torch.cat([p.grad._values().flatten() for p in tables(run).values()])
        norms[precision, "tables"] = float(values.norm())
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.05)
    assert norms["fp16", "tables"] == pytest.approx(norms["fp32", "tables"], rel=0.05)


def train(experiment, folder, **options):
    return api.train(experiment, out=folder, stream=io.StringIO(), **options)


@pytest.mark.fault
@BOTH
def test_resumed_equals_uninterrupted(tiny, tmp_path, monkeypatch, inject, update):  # fault 17
    batch_norm = "model.blocks.main.1.query_norm=batch"
    experiment = tiny(*PEER, batch_norm, by_row(update, lr_multiplier=3))
    whole = train(experiment, tmp_path / "whole")
    inject("train.step:7:term")
    with pytest.raises(Preempted):
        train(experiment, tmp_path / "cut", resume="auto")
    monkeypatch.delenv("GRAFT_FAULT")
    torch.manual_seed(5)
    resumed = train(experiment, tmp_path / "cut", resume="auto")
    assert_same_weights(resumed, whole)
    assert_same_state(resumed, whole)
    assert lines(tmp_path / "cut" / "metrics.jsonl") == lines(tmp_path / "whole" / "metrics.jsonl")
    moved = [b for name, b in resumed.model.named_buffers() if name.endswith("running_mean")]
    assert len(moved) == 2
    assert all(b.any() for b in moved)


def test_state_of_another_update_is_refused(tiny, tmp_path):
    train(tiny(*PEER, by_row("rowwise_adagrad"), "training.max_steps=4"), tmp_path / "run")
    for other in ((), (by_row("rowwise_adam"),)):
        with pytest.raises(CheckpointError, match=r"optimizer\.groups\.expert_table\.update: the update is .*adagrad"):
            train(tiny(*PEER, *other), tmp_path / "run", resume="auto")


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
def test_compiled_layers_make_the_same_row_gradients(tiny):
    steps = [[random_batch(2, 16, seed=1)]]
    eager, compiled = (bare_run(tiny(*PEER, by_row("rowwise_adam")), steps) for _ in range(2))
    compiled.model.set_runtime(compile=True)
    assert float(gradients(compiled)) == pytest.approx(float(gradients(eager)), rel=1e-5)
    for one, other in zip(tables(eager).values(), tables(compiled).values(), strict=True):
        assert other.grad.is_sparse
        torch.testing.assert_close(other.grad.to_dense(), one.grad.to_dense(), rtol=1e-4, atol=1e-7)
