"""Trackers get the numbers; when one fails, it is the only one that stops."""

from __future__ import annotations

import sys

import pytest

from graft.config.experiment import WandbConfig
from graft.errors import ResourceError
from graft.training.trackers import TensorBoardTracker, Trackers, WandbTracker


class Memory:
    name = "Memory"

    def __init__(self, fails_at=None):
        self.fails_at = fails_at
        self.seen = []
        self.closed = False

    def log(self, step, numbers):
        if step == self.fails_at:
            raise ConnectionError("server down")
        self.seen.append((step, dict(numbers)))

    def close(self):
        self.closed = True


@pytest.mark.fault
def test_a_tracker_that_raises_costs_one_warning_and_nothing_else():  # fault 46
    good, bad, warnings = Memory(), Memory(fails_at=2), []
    trackers = Trackers({"good": lambda: good, "bad": lambda: bad}, warnings.append)
    for step in range(1, 5):
        trackers.log(step, {"loss": float(step)})
    trackers.close()
    assert [step for step, _ in good.seen] == [1, 2, 3, 4]
    assert [step for step, _ in bad.seen] == [1]
    assert good.closed
    assert not bad.closed
    assert len(warnings) == 1
    assert "server down" in warnings[0]


@pytest.mark.fault
def test_a_tracker_that_cannot_start_costs_one_warning():  # fault 46
    warnings = []

    def broken():
        raise TimeoutError("no answer")

    trackers = Trackers({"remote": broken}, warnings.append)
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert warnings == ["remote failed and gets no more numbers of this run: TimeoutError: no answer"]


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_missing_package_is_an_error_before_the_first_step(tracker, tmp_path, monkeypatch, tiny):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    makers = {
        "tensorboard": lambda: TensorBoardTracker(tmp_path),
        "wandb": lambda: WandbTracker(tmp_path, WandbConfig(), tiny()),
    }
    with pytest.raises(ResourceError, match=rf"'{tracker}', which is not installed.*graft\[track\]"):
        Trackers({tracker: makers[tracker]}, pytest.fail)


def test_tensorboard_files_hold_the_numbers(tmp_path):
    tracker = TensorBoardTracker(tmp_path)
    tracker.log(3, {"train/loss": 2.5})
    tracker.close()
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (file,) = (tmp_path / "tensorboard").iterdir()
    scalars = [
        (event.step, value.tag, value.tensor.float_val[0])
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    ]
    assert scalars == [(3, "train/loss", 2.5)]


def test_offline_wandb_stays_in_the_run_directory_and_directories_of_one_name_are_apart(tmp_path, tiny):
    folders = [tmp_path / place / "run-1" for place in ("here", "there")]
    for folder in folders:
        folder.mkdir(parents=True)
        for _ in ("started", "resumed"):
            tracker = WandbTracker(folder, WandbConfig(), tiny())
            tracker.log(1, {"train/loss": 2.5})
            tracker.close()
    ids = [{file.stem.split("-")[1] for file in folder.glob("wandb/offline-run-*/*.wandb")} for folder in folders]
    assert [len(found) for found in ids] == [1, 1]
    assert ids[0] != ids[1]
