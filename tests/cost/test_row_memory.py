"""Memory of tables with row-wise updates: neither their gradients nor their state is priced as dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graft.config.experiment import Experiment
from graft.config.load import load_experiment_from_dict
from graft.cost.live_bytes import LiveBytes
from graft.cost.memory import training_memory
from graft.data.batch import Batch
from graft.model import build_model
from graft.ops.row_gradients import rows_only, summed_rows
from graft.training.gradients import gradient_values

EXPERTS, WIDTH, READS = 64 * 64, 2 * 16, 2 * 3
VOCAB = 64


def experiment(update: str | None, *overrides: str) -> Experiment:
    peer: dict[str, Any] = {"type": "peer", "product_key_dims": [64, 64], "num_experts_per_tok": 3, "num_heads": 2}
    peer |= {"query_dim": 8, "expert_hidden_size": 2, "track_usage": False}
    data: dict[str, Any] = {
        "model": {
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "num_layers": 1,
            "norm": {"type": "rms_norm"},
            "blocks": {"b": [peer]},
        },
        "objective": {"type": "causal_lm"},
        "data": {"source": {"type": "embedded"}, "tokenizer": {"type": "bytes"}, "seq_len": 8},
        "optimizer": {"type": "adamw", "learning_rate": 1e-3},
        "schedule": {"type": "constant"},
        "training": {"max_steps": 7, "global_batch_size": 4},
        "runtime": {"device": "cpu"},
    }
    if update is not None:
        data["optimizer"]["groups"] = {"expert_table": {"update": update}}
    return load_experiment_from_dict(data, overrides)


@pytest.mark.parametrize("update", [None, "rowwise_adagrad", "rowwise_adam"])
@pytest.mark.parametrize("micro_batch_size", [4, 2])
def test_gradients_and_state_of_tables(update: str | None, micro_batch_size: int) -> None:
    memory = training_memory(experiment(update, f"training.micro_batch_size={micro_batch_size}"), VOCAB)
    tables = 2 * EXPERTS * WIDTH * 4
    others = memory.weights - tables
    rows = 2 * 4 * 8 * READS * (WIDTH * 4 + 8)  # every read another row
    per_row = {"rowwise_adagrad": 2 * EXPERTS * 4, "rowwise_adam": 2 * EXPERTS * 4 + 2 * tables, None: 2 * tables}
    assert memory.gradients == others + (tables if update is None else rows)
    assert memory.optimizer == pytest.approx(2 * others + per_row[update], abs=100)  # counts of updates


@pytest.mark.parametrize("micro_batch_size", [4, 1])
def test_peak_is_that_of_real_tensors(micro_batch_size: int) -> None:
    size = ("model.blocks.b.0.product_key_dims=[512,512]", "data.seq_len=256")
    config = experiment("rowwise_adagrad", *size, f"training.micro_batch_size={micro_batch_size}")
    memory = training_memory(config, VOCAB)
    predicted = memory.total - memory.scratch - memory.heap - memory.weights
    model = build_model(config.model, VOCAB, seed=0)
    objective, optimizer = config.objective.build(), config.optimizer.build(model)
    with LiveBytes() as live:
        views = [p.detach() for p in model.parameters()]  # a view makes the weights known
        assert live.open_window() == memory.weights == sum(4 * v.numel() for v in views)
        for _ in range(2):
            for _ in range(2 if micro_batch_size < 4 else 1):
                ids = torch.randint(VOCAB, (micro_batch_size, 256))
                batch = Batch(ids, ids.clone(), torch.ones_like(ids), None, ids.numel(), 0, ())
                (objective.loss(model, batch).main / ids.numel()).backward()
            gradient_values(model.parameters())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    table = EXPERTS * 64 * WIDTH * 4
    held = live.window_peak - memory.weights
    assert held < table, "no dense gradient, no copy of a table"
    assert predicted == pytest.approx(held, rel=0.15)


def test_live_bytes_of_row_gradients() -> None:
    with LiveBytes() as live:
        gradient = rows_only(torch.tensor([1, 5, 7]), torch.ones(3, 4), 10)
        assert live.live == 3 * (8 + 16)
        total = summed_rows(gradient)
        assert live.live == 2 * 3 * (8 + 16)
        del gradient, total
        assert live.live == 0
