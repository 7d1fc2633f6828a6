"""The loader: the same rows whatever the workers, the micro-batch or the interruption; a fixed held-out set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graft.config.experiment import Experiment
from graft.data.batch import IGNORED_TARGET, Batch
from graft.data.loader import TrainLoader, validation_batches
from graft.data.packing import base
from graft.data.prepare import PreparedData, prepare
from graft.errors import CheckpointError
from tiny_data import data_config, experiment, words, write_jsonl

VARIANTS: list[dict[str, Any]] = [
    {},
    {"packing": {"type": "concat", "document_mask": False}},
    {"packing": {"type": "best_fit"}},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "a.jsonl", [words(3 + i % 7, i) for i in range(40)])
    return folder


def setup(folder: Path, variant: dict[str, Any], **changes: Any) -> tuple[PreparedData, Experiment]:
    made = experiment(data_config(folder / "a.jsonl", **variant), folder / "cache", **changes)
    return prepare(made), made


def tensors(batches: list[Batch]) -> list[torch.Tensor]:
    """The step's inputs, targets, segments and positions, micro-batches joined."""
    names = ("input_ids_BT", "targets_BT", "segment_ids_BT", "positions_BT")
    columns = ([getattr(b, name) for b in batches] for name in names)
    return [torch.cat(column) for column in columns if column[0] is not None]


def equal(a: list[Batch], b: list[Batch]) -> bool:
    ids = [[i for batch in step for i in batch.sample_ids] for step in (a, b)]
    return ids[0] == ids[1] and all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_ignored_targets_are_called_the_same_everywhere() -> None:
    assert base.IGNORED_TARGET == IGNORED_TARGET


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_continues_exactly_across_epochs(folder: Path, variant: dict[str, Any]) -> None:
    prepared, made = setup(folder, variant, batch=10, micro=5)
    loader = TrainLoader(prepared, made)
    steps = 3 * loader.rows_per_epoch // 10 + 2
    states, batches = [], []
    for _ in range(steps):
        states.append(loader.state_dict())
        batches.append(loader.next_step())
    assert max(state["epoch"] for state in states) >= 2
    assert any(state["index"] % 10 for state in states)  # epochs end inside a step
    for start in range(0, steps, 3):
        resumed = TrainLoader(prepared, made)
        resumed.load_state_dict(states[start])
        assert resumed.state_dict() == states[start]
        for step in range(start, steps):
            assert equal(resumed.next_step(), batches[step])
        assert resumed.state_dict() == loader.state_dict()


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_do_not_depend_on_the_micro_batch(folder: Path, variant: dict[str, Any]) -> None:
    whole = TrainLoader(*setup(folder, variant, batch=6))
    parts = TrainLoader(*setup(folder, variant, batch=6, micro=2))
    for _ in range(4):
        one, three = whole.next_step(), parts.next_step()
        assert (len(one), len(three)) == (1, 3)
        assert equal(one, three)
        assert one[0].num_targets == sum(b.num_targets for b in three)
        assert one[0].num_bytes == sum(b.num_bytes for b in three)


def test_workers_hand_out_the_same_steps_and_resume(folder: Path) -> None:
    plain = TrainLoader(*setup(folder, {}))
    loaders = [TrainLoader(*setup(folder, {}, workers=n)) for n in (1, 2)]
    steps = [plain.next_step() for _ in range(12)]
    try:
        for loader in loaders:
            for step in steps[:5]:
                assert equal(loader.next_step(), step)
            assert loader.state_dict()["index"] == 20 % loader.rows_per_epoch
            loader.load_state_dict({"epoch": 0, "index": 8})  # what was prepared ahead is thrown away
            for step in steps[2:]:
                assert equal(loader.next_step(), step)
    finally:
        for loader in loaders:
            loader.close()


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_epoch_counts_every_byte_once(folder: Path, variant: dict[str, Any]) -> None:
    prepared, made = setup(folder, variant, batch=1)
    loader = TrainLoader(prepared, made)
    batches = [loader.next_step()[0] for _ in range(loader.rows_per_epoch)]
    assert sum(b.num_bytes for b in batches) == prepared.train.num_bytes == prepared.report["train"]["bytes"]
    assert sum(b.num_targets for b in batches) == prepared.train.num_tokens
    for b in batches:
        assert b.num_targets == (b.targets_BT != IGNORED_TARGET).sum()
    assert sorted(i for b in batches for i in b.sample_ids) == list(range(loader.rows_per_epoch))


def test_fewer_rows_than_a_batch_wrap(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [words(4, i) for i in range(4)])
    prepared, made = setup(tmp_path, {}, batch=50)
    loader = TrainLoader(prepared, made)
    assert loader.rows_per_epoch < 25
    (batch,) = loader.next_step()
    assert batch.input_ids_BT.shape == (50, 16)
    assert loader.state_dict()["epoch"] >= 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_validation_is_fixed_complete_and_of_one_shape(folder: Path, variant: dict[str, Any]) -> None:
    variant = {**variant, "validation": {"fraction": 0.4}}
    prepared, made = setup(folder, variant, batch=4, seed=3)
    batches = list(validation_batches(prepared, made))
    again = list(validation_batches(*setup(folder, variant, batch=4, seed=9)))
    assert all(equal([a], [b]) for a, b in zip(batches, again, strict=True))
    assert {b.input_ids_BT.shape for b in batches} == {(4, 16)}
    assert sum(b.num_targets for b in batches) == prepared.validation.num_tokens
    assert sum(b.num_bytes for b in batches) == prepared.validation.num_bytes
    few = experiment(made.data, folder / "cache", evaluation={"max_sequences": 3, "batch_size": 2})
    limited = list(validation_batches(prepared, few))
    assert [b.num_targets > 0 for b in limited] == [True, True]
    assert (limited[1].targets_BT[1] == IGNORED_TARGET).all()
    seen = torch.cat([b.input_ids_BT for b in limited])[:3]
    assert torch.equal(seen, torch.cat([b.input_ids_BT for b in batches])[:3])


def test_a_state_of_other_data_is_refused(folder: Path) -> None:
    loader = TrainLoader(*setup(folder, {}))
    for state in (
        {},
        {"epoch": 0, "index": loader.rows_per_epoch},
        {"epoch": -1, "index": 0},
        {"epoch": "0", "index": 0},
    ):
        with pytest.raises(CheckpointError, match="does not exist"):
            loader.load_state_dict(state)


def test_batches_are_plain_int64(folder: Path) -> None:
    for variant in VARIANTS:
        prepared, made = setup(folder, variant)
        (batch,) = TrainLoader(prepared, made).next_step()
        assert all(t.dtype == torch.int64 for t in tensors([batch]))
        assert batch.input_ids_BT.max() < prepared.vocab_size
        assert np.asarray(batch.sample_ids).tolist() == [0, 1, 2, 3]
