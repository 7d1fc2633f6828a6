"""The n-gram memory: the formula, what it reaches, its quiet start, its state, its tables and their optimizer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from graft.config.load import load_experiment
from graft.config.model import ModelConfig
from graft.contracts import sequence, training
from graft.contracts.subject import Subject
from graft.data.tokenizers.bytes_config import BytesTokenizerConfig
from graft.memories.ngram import Ngram
from graft.memories.ngram_config import NgramConfig
from graft.model import Model, build_model
from graft.objectives.causal_lm_config import CausalLMConfig
from graft.ops.ngram_hash import hashed_rows
from graft.ops.row_gradients import mark_rows
from graft.optimizers.groups import describe_groups
from graft.part import Context, parameter_roles, tensors_of
from graft.training.step import train_step
from tiny_run import bare_run, random_batch, tiny

PRESET = Path(__file__).parents[2] / "presets/memories/ngram.yaml"
D, VOCAB = 16, 31
MEMORY: dict[str, Any] = {"type": "ngram", "num_hash_heads": 2, "table_size": 40, "row_dim": 3}
ATTENTION = {"type": "attention", "num_heads": 2, "position": {"type": "rope"}}


def subject(*parts: dict[str, Any], **fields: Any) -> Subject:
    data = {
        "hidden_size": D,
        "num_layers": 1,
        "norm": {"type": "rms_norm"},
        "blocks": {"b": list(parts or (MEMORY,))},
        **fields,
    }
    return Subject(ModelConfig.model_validate(data), CausalLMConfig(), vocab_size=VOCAB)


def part_of(model: Model) -> Ngram:
    return next(m for m in model.modules() if isinstance(m, Ngram))


def context(ids: Tensor, segments: Tensor | None = None) -> Context:
    return Context(ids, torch.arange(ids.shape[1]).expand(ids.shape), segments)


def by_definition(part: Ngram, x_TD: Tensor, ids: list[int]) -> Tensor:
    """One document, position by position, from the formula of the docstring."""
    values = []
    for t in range(len(ids)):
        rows, first = [], 0
        for order, size, factors in zip(
            part.tables.orders, part.tables.sizes, part.tables.multipliers.tolist(), strict=True
        ):
            mixed = 0
            for k in range(min(order, t + 1)):
                mixed ^= (ids[t - k] + 1) * factors[k]
            rows.append(part.tables.weight[first + mixed % size])
            first += size
        e = torch.cat(rows)
        gate = part.stream_norm(x_TD[t]) @ part.k_norm(part.k_proj(e)) / math.sqrt(x_TD.shape[1])
        values.append(gate.sigmoid() * part.v_proj(e))
    if part.conv is None or part.conv_norm is None:
        return torch.stack(values)
    width, out = part.conv.weight.shape[1], []
    for t, v in enumerate(values):
        back = [(width - 1 - i) * part.span for i in range(width)]
        taps = [part.conv.weight[:, i] * part.conv_norm(values[t - b]) for i, b in enumerate(back) if b <= t]
        out.append(F.silu(torch.stack(taps).sum(0)) + v)
    return torch.stack(out)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize(
    "fields", [{}, {"conv_size": None}, {"orders": [1, 2, 4], "conv_size": 2, "num_hash_heads": 3}]
)
def test_values_and_gradients_are_those_of_the_formula(fields: dict[str, Any], kernels: Any) -> None:
    model = subject({**MEMORY, **fields}).model
    model.set_runtime(kernels=kernels)
    part, ids = part_of(model), torch.randint(VOCAB, (1, 11))
    x = torch.randn(1, 11, D, dtype=torch.float64)
    direction, results = torch.randn(11, D, dtype=torch.float64), []
    for form in (lambda x: part(x, context(ids)).y[0], lambda x: by_definition(part, x[0], ids[0].tolist())):
        start = x.clone().requires_grad_()
        y = form(start)
        grads = torch.autograd.grad((y * direction).sum(), [start, *part.parameters()])
        results.append((y, *grads))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_low_precision_is_near() -> None:
    shown = subject()
    part, exact = (part_of(shown.build(dtype=dtype)) for dtype in (torch.float32, torch.float64))
    ids, x = torch.randint(VOCAB, (2, 11)), torch.randn(2, 11, D)
    expected = exact(x.double(), context(ids)).y
    torch.testing.assert_close(part(x, context(ids)).y.double(), expected, rtol=1e-5, atol=1e-5)
    y = part.to(torch.bfloat16)(x.bfloat16(), context(ids)).y
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=0.03, atol=0.03 * expected.abs().max().item())


@torch.no_grad()
def test_how_far_a_token_reaches() -> None:
    """A token changes the n-grams it is in, and what the convolution makes of them: nothing before, nothing beyond."""
    part, ids, x = part_of(subject().model), torch.randint(VOCAB, (1, 20)), torch.randn(1, 20, D, dtype=torch.float64)
    changed = ids.clone()
    changed[0, 4] = (ids[0, 4] + 7) % VOCAB
    moved = (part(x, context(ids)).y != part(x, context(changed)).y).any(-1)[0]
    seen = [4 + k + 3 * tap for tap in range(4) for k in range(3)]  # trigrams, four taps three apart
    assert moved.nonzero().flatten().tolist() == seen


@torch.no_grad()
def test_at_the_start_the_convolution_is_silent() -> None:
    model = build_model(subject().config, VOCAB, seed=0, dtype=torch.float64)
    part = part_of(model)
    assert part.conv is not None
    assert not part.conv.weight.any()
    ids, x = torch.randint(VOCAB, (1, 7)), torch.randn(1, 7, D, dtype=torch.float64)
    part_without = part_of(build_model(subject({**MEMORY, "conv_size": None}).config, VOCAB, seed=0).double())
    y = part(x, context(ids)).y
    assert y.all()
    torch.testing.assert_close(y, part_without(x, context(ids)).y, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("residual", ["none", "depth"])
def test_values_at_zero_make_it_a_no_op_that_can_learn(residual: str) -> None:
    with_memory, without = (
        build_model(subject(*parts, init={"residual": residual}).config, VOCAB, seed=0)
        for parts in (({**MEMORY, "zero_init_output": True}, ATTENTION), (ATTENTION,))
    )
    ids = torch.randint(VOCAB, (2, 9))
    assert torch.equal(with_memory(ids), without(ids))
    with_memory(ids).square().sum().backward()
    weight: Any = part_of(with_memory).v_proj.weight
    assert weight.grad.any()


@pytest.mark.parametrize("fields", [{"bidirectional": True}, {"loops": 2}, {"num_layers": 2}])
def test_contracts_hold_in_other_networks(fields: dict[str, Any]) -> None:
    shown = subject(MEMORY, ATTENTION, **fields)
    sequence.documents_do_not_meet(shown)
    sequence.padding_does_not_matter(shown)
    training.micro_batches_add_up(shown)
    training.kernels_agree(shown)
    if "bidirectional" in fields:
        sequence.looks_both_ways(shown)
    else:
        sequence.decoding_equals_forward(shown)
        sequence.batched_decoding_equals_single(shown)


def test_decoding_with_classes_of_ids() -> None:
    shown = subject(MEMORY, ATTENTION)
    shown = Subject(shown.config, shown.objective, vocab_size=257)
    ids = torch.tensor([[ord(c) for c in "The the tHE"]])
    part = part_of(shown.model)
    x = torch.randn(1, 1, D, dtype=torch.float64).expand(1, 11, D)
    different = part(x, context(ids)).y
    shown.model.use_tokenizer(BytesTokenizerConfig().build())
    same = part(x, context(ids)).y
    assert not torch.equal(different[0, 2], different[0, 6])
    read = [part._suffixes(context(ids), None)[0][0, t].tolist() for t in (2, 6, 10)]
    assert read[0] == read[1] == read[2]  # the trigram is the same word
    assert not torch.equal(same, different)
    sequence.decoding_equals_forward(shown)


def test_state() -> None:
    part = part_of(subject().build(dtype=torch.float32))
    state = part.init_state(1, 100, device=torch.device("cpu"), dtype=torch.float32)
    counted = sum(t.numel() * t.element_size() for t in tensors_of(state))
    assert part.state_bytes(100, torch.float32) == part.state_bytes(7, torch.float32) == counted
    assert counted == 2 * 2 * 8 + 3 * 3 * (4 * D + 8)  # two ids; nine vectors, each with its document
    assert part_of(subject({**MEMORY, "conv_size": None}).model).state_bytes(9, torch.float32) == 2 * 2 * 8


def test_price() -> None:
    part = part_of(subject().build(dtype=torch.float32))
    with FlopCounterMode(display=False) as counter:
        part(torch.randn(1, 12, D), context(torch.randint(VOCAB, (1, 12))))
    assert part.flops_per_token(12) == pytest.approx(counter.get_total_flops() / 12, rel=1e-9)
    assert part.tables.sizes == [41, 43, 47, 53]
    total = sum(p.numel() for p in part.parameters())
    assert part.active_parameters() == total - 3 * (41 + 43 + 47 + 53) + 3 * 4


def test_tables_get_their_own_settings() -> None:
    experiment = load_experiment(PRESET, ["optimizer.weight_decay=0.1"])
    model = build_model(experiment.model, 257, seed=0)
    assert {n for n, role in parameter_roles(model).items() if role == "expert_table"} == {
        "layers.1.ngram.part.tables.weight"
    }
    row = next(r for r in describe_groups(experiment.optimizer.build(model)) if r.role == "expert_table")
    assert (row.algorithm, row.lr_multiplier, row.weight_decay) == ("adamw", 5.0, 0.0)
    muon = load_experiment(PRESET, ["optimizer={type: muon, learning_rate: 0.01}"]).optimizer.build(model)
    row = next(r for r in describe_groups(muon) if r.role == "expert_table")
    assert row.algorithm == "adamw"


def test_gradients_of_the_rows_that_were_read() -> None:
    model, ids = subject().model, torch.randint(VOCAB, (2, 9))
    table = part_of(model).tables.weight
    grads = []
    for rows in (False, True):
        mark_rows(table, rows)
        model.zero_grad()
        model(ids).square().sum().backward()
        assert table.grad is not None
        assert table.grad.is_sparse == rows
        grads.append(table.grad.to_dense() if rows else table.grad.clone())
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("update", ["rowwise_adagrad", "rowwise_adam"])
def test_a_step_touches_only_the_rows_it_read(tmp_path: Path, update: str) -> None:
    memory = "model.blocks.main.0={type: ngram, table_size: 400, num_hash_heads: 2, row_dim: 4}"
    experiment = tiny(tmp_path, memory, f"optimizer.groups={{expert_table: {{update: {update}, lr_multiplier: 5.0}}}}")
    microbatches = [random_batch(1, 8, seed=0), random_batch(1, 8, seed=1)]
    run = bare_run(experiment, [microbatches])
    tables = [m.tables for m in run.model.modules() if isinstance(m, Ngram)]
    before = [t.weight.detach().clone() for t in tables]
    part = part_of(run.model)
    with torch.no_grad():
        read = [hashed_rows(part._suffixes(context(b.input_ids_BT), None)[0], *_hash(part)) for b in microbatches]
    train_step(run)
    moved = (tables[0].weight != before[0]).any(-1).nonzero().flatten()
    assert torch.equal(moved, (torch.cat(read) + _offsets(part)).unique())
    assert len(moved) < 0.2 * len(before[0])
    assert all((t.weight != b).any() for t, b in zip(tables, before, strict=True))


def _hash(part: Ngram) -> tuple[Tensor, Tensor]:
    return part.tables.multipliers, torch.tensor(part.tables.sizes)


def _offsets(part: Ngram) -> Tensor:
    return torch.tensor([sum(part.tables.sizes[:i]) for i in range(len(part.tables.sizes))])


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
def test_compiled_with_gradients_of_rows() -> None:
    model, ids = subject(MEMORY, ATTENTION).build(), torch.randint(VOCAB, (2, 9))
    table = part_of(model).tables.weight
    mark_rows(table, True)
    grads = []
    for compile in (False, True):
        model.set_runtime(compile=compile)
        model.zero_grad()
        model(ids).square().sum().backward()
        assert table.grad is not None
        assert table.grad.is_sparse
        grads.append([table.grad.to_dense(), *(p.grad for p in model.parameters() if p is not table)])
    torch.testing.assert_close(*grads)


def test_hashes_belong_to_the_model() -> None:
    """Two layers, and two seeds, hash differently; a saved model hashes as it was trained."""
    two = subject(MEMORY, num_layers=2).build()
    first, second = (m.tables.multipliers for m in two.modules() if isinstance(m, Ngram))
    other = part_of(build_model(subject().config, VOCAB, seed=1)).tables.multipliers
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    assert "layers.0.ngram.part.tables.multipliers" in two.state_dict()
    assert (first[:2, 2:] == 0).all()
    assert (first[:2, :2] % 2 == 1).all()
    assert (first[2:] % 2 == 1).all()


@pytest.mark.parametrize("orders", [[3, 2], [2, 2], [0, 1]])
def test_orders_rise(orders: list[int]) -> None:
    with pytest.raises(ValidationError, match="rising"):
        NgramConfig.model_validate({**MEMORY, "orders": orders})
