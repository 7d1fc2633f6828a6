"""Predicted memory against closed forms, real allocations and the resident memory of real training."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from graft.config.experiment import Experiment
from graft.config.load import load_experiment_from_dict
from graft.cost.heap import HELD, SLACK, GlibcHeap
from graft.cost.live_bytes import LiveBytes
from graft.cost.memory import training_memory
from graft.data.batch import Batch
from graft.model import build_model


def experiment(*overrides: str) -> Experiment:
    attention = {"type": "attention", "num_heads": 4, "position": {"type": "rope"}}
    data: dict[str, Any] = {
        "model": {
            "vocab_size": 4096,
            "hidden_size": 256,
            "num_layers": 4,
            "norm": {"type": "rms_norm"},
            "blocks": {"b": [attention, {"type": "mlp", "intermediate_size": 1024}]},
        },
        "objective": {"type": "causal_lm"},
        "data": {"source": {"type": "embedded"}, "tokenizer": {"type": "bytes"}, "seq_len": 256},
        "optimizer": {"type": "adamw", "learning_rate": 1e-3},
        "schedule": {"type": "constant"},
        "training": {"max_steps": 7, "global_batch_size": 4},
        "runtime": {"device": "cpu"},
    }
    return load_experiment_from_dict(data, overrides)


SMALL = ("model.hidden_size=64", "model.blocks.b.1.intermediate_size=256", "data.seq_len=64", "model.vocab_size=500")


def train_steps(config: Experiment, count: int) -> None:
    """Real updates on made-up tokens, as the training step makes them."""
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    model = build_model(config.model, vocab_size, seed=0)
    model.set_runtime(activation_checkpointing=config.runtime.activation_checkpointing)
    objective, optimizer = config.objective.build(), config.optimizer.build(model)
    shape = (config.micro_batch_size, config.data.seq_len)
    ids = torch.zeros(shape, dtype=torch.long)
    batch = Batch(ids, ids.clone(), torch.ones_like(ids), None, num_targets=ids.numel(), num_bytes=0, sample_ids=())
    for _ in range(count):
        for _ in range(config.training.global_batch_size // config.micro_batch_size):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision == "bf16"):
                terms = objective.loss(model, batch)
            (terms.main / batch.num_targets + terms.aux).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_live_bytes_follow_storages() -> None:
    with LiveBytes() as live:
        x = torch.zeros(1000)
        assert live.live == 4000
        view = x[:10].view(2, 5)
        x.add_(1)
        assert live.live == 4000, "views and changes in place hold nothing new"
        y = x.exp()
        assert live.live == 8000
        del x
        assert live.live == 8000, "the view keeps its storage"
        del view
        assert (live.live, live.peak) == (4000, 8000)
        assert live.open_window() == 4000
        y = y.double()
        assert (live.live, live.window_peak, live.peak) == (8000, 12000, 12000)


def test_what_autograd_keeps_is_live() -> None:
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        y = x.exp().exp().exp().sum()
        assert live.live == 3 * 4000 + 4
        y.backward()
        assert live.live == 4000 + 4, "the gradient and the loss"
    with LiveBytes() as live:
        y = checkpoint(lambda x: x.exp().exp().exp(), x * 1, use_reentrant=False)
        assert live.live == 2 * 4000, "input and output of the recomputed part"
        del y


@pytest.mark.parametrize(
    "overrides",
    [(), ("precision=bf16",), ("runtime.activation_checkpointing=block",), ("training.micro_batch_size=2",)],
    ids=["fp32", "bf16", "recomputed", "accumulated"],
)
def test_the_rehearsal_allocates_what_training_allocates(overrides: tuple[str, ...]) -> None:
    config = experiment(*SMALL, *overrides)
    gc.collect()
    with LiveBytes() as live:
        train_steps(config, 2)
    predicted = training_memory(config, 500)
    assert predicted.total - predicted.heap - predicted.scratch == pytest.approx(live.peak, rel=0.02)


def test_weights_gradients_and_optimizers_in_closed_form() -> None:
    model = build_model(experiment(*SMALL).model, 500, seed=0, device="meta")
    total = model.num_parameters()
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embedding" not in name)
    adamw = training_memory(experiment(*SMALL), 500)
    assert adamw.weights == adamw.gradients == 4 * total
    scalars = 4 * len(list(model.parameters()))
    assert 8 * total <= adamw.optimizer <= 8 * total + scalars
    muon = training_memory(experiment(*SMALL, "optimizer.type=muon", "optimizer.learning_rate=0.001"), 500)
    expected = 4 * matrices + 8 * (total - matrices)
    assert expected <= muon.optimizer <= expected + scalars
    assert muon.update > adamw.update


def test_what_saves_memory_is_seen_to_save_it() -> None:
    plain = training_memory(experiment(*SMALL), 500)
    recomputed = training_memory(experiment(*SMALL, "runtime.activation_checkpointing=block"), 500)
    assert recomputed.activations < plain.activations / 4
    halved = training_memory(experiment(*SMALL, "training.micro_batch_size=2"), 500)
    assert halved.activations < 0.6 * plain.activations
    assert training_memory(experiment(*SMALL, "precision=bf16"), 500).activations < plain.activations
    large = ("model.vocab_size=20000",)
    whole = training_memory(experiment(*SMALL, *large), 20_000)
    chunked = training_memory(experiment(*SMALL, *large, "runtime.loss_chunk_bytes=1000000"), 20_000)
    assert chunked.logits < whole.logits / 2


def test_the_heap_reuses_what_fits_and_merges_holes() -> None:
    heap = GlibcHeap()
    for key in range(4):
        heap.allocate(key, 100_000)
    full = heap.peak
    assert 400_000 <= full <= 400_000 + 4 * (SLACK + 64)
    heap.allocate(9, 500)
    assert heap.peak == full, "small requests are left out"
    heap.release(9)
    heap.release(1)
    heap.allocate(4, 100_000)
    assert heap.peak > full, "a hole of the same size is too small for an aligned request"
    grown = heap.peak
    heap.allocate(5, 99_000)
    assert heap.peak == grown, "a smaller one fits"


def test_the_heap_merges_neighbouring_holes() -> None:
    heap = GlibcHeap()
    for key in range(4):
        heap.allocate(key, 102_400 - 16)  # with its header a multiple of the alignment: nothing is split off
    full = heap.peak
    heap.release(1)
    heap.release(2)
    heap.allocate(5, 200_000)
    assert heap.peak == full


def test_the_heap_shrinks_to_nothing_and_grows_again_in_place() -> None:
    heap = GlibcHeap()
    for round_ in range(3):
        for key in range(HELD * 2):
            heap.allocate(key, 10_000)
        if round_ == 0:
            first = heap.peak
        for key in range(HELD * 2):
            heap.release(key)
    assert heap.peak < 1.6 * first


MEASURE = """
import json, sys
sys.path[:0] = json.loads(sys.argv[2])
from test_memory import SMALL, experiment, train_steps

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

overrides = json.loads(sys.argv[1])
train_steps(experiment(*SMALL, *overrides), 2)  # loads every library the measured steps use
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the resident peak starts over
before = status("VmRSS")
train_steps(experiment(*overrides), 3)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's resident peak")
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("precision=bf16",),
        ("data.seq_len=512", "training.global_batch_size=8", "runtime.activation_checkpointing=block"),
    ],
    ids=["fp32", "bf16", "recomputed"],
)
def test_predicted_peak_is_within_15_percent_of_resident_memory(overrides: tuple[str, ...]) -> None:
    """Growth of the resident peak over a process that has everything loaded and has trained a small model.

    glibc is told to map every tensor on its own, so that the figure repeats: what its heap loses otherwise does not.
    """
    paths = json.dumps([str(Path(__file__).parent)])
    command = [sys.executable, "-c", MEASURE, json.dumps(overrides), paths]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    predicted = training_memory(experiment(*overrides), 4096)
    assert predicted.total - predicted.heap == pytest.approx(int(result.stdout), rel=0.15)
