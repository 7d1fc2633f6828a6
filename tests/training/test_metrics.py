"""Metric and event lines: comparable, whole, each step once; rows 15, 44 and 45 of the fault matrix."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import signal
import struct

import pytest

from graft.faults import reset_faults
from graft.training.metrics import EventsLog, JsonLines, MetricsLog, read_lines


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write(log, *steps):
    return [log.write(step, {"loss": 1 / step, "ce": 0.1 + step}) for step in steps]


def steps(path):
    return [record["step"] for record in read_lines(path)]


def dropped(path):
    return path.with_name("metrics.dropped.jsonl")


def test_lines_are_on_the_disk_at_once_and_read_back_bit_for_bit(path):
    log = MetricsLog(path)
    values = {
        "loss": 0.1 + 0.2,
        "tiny": 5e-324,
        "big": 1.7976931348623157e308,
        "zero": -0.0,
        "count": 2**60,
        "note": "é",
    }
    assert log.write(3, values, time={"tokens_per_second": 12.5})
    (record,) = read_lines(path)
    assert record == {"step": 3, **values, "time": {"tokens_per_second": 12.5}}
    for name in ("loss", "tiny", "big", "zero"):
        assert struct.pack(">d", record[name]) == struct.pack(">d", values[name])


def test_values_json_has_no_word_for_are_strings(path):
    MetricsLog(path).write(1, {"a": math.nan, "b": math.inf, "c": [-math.inf], "d": {"e": math.nan}})
    text = path.read_text()
    assert json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")) == {
        "step": 1, "a": "NaN", "b": "Infinity", "c": ["-Infinity"], "d": {"e": "NaN"}
    }  # fmt: skip


def test_equal_runs_write_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write(MetricsLog(tmp_path / name), 1, 2, 3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("name", ["step", "time"])
def test_names_with_a_meaning_of_their_own_are_not_values(path, name):
    with pytest.raises(AssertionError):
        MetricsLog(path).write(1, {name: 1.0})


@pytest.mark.fault
@pytest.mark.parametrize("resume_step", [0, 2, 3, 5, 9])
@pytest.mark.parametrize("torn", [b"", b'{"step": 6, "lo', b"{", b'{"step": 6, "loss": 1}', b"\xff\x00"])
def test_a_resumed_run_writes_the_lines_of_an_uninterrupted_one(tmp_path, path, resume_step, torn):
    """Row 45: killed after step 5, while appending; resumed from a checkpoint of an earlier step."""
    whole = tmp_path / "whole.jsonl"
    write(MetricsLog(whole), *range(1, 10))
    write(MetricsLog(path), *range(1, 6))
    with path.open("ab") as file:
        file.write(torn)
    resumed = MetricsLog(path, resume_step=resume_step)
    start = min(resume_step, 5)
    assert steps(path) == list(range(1, start + 1))
    write(resumed, *range(start + 1, 10))
    assert path.read_bytes() == whole.read_bytes()
    lost = list(range(start + 1, 6))
    assert (steps(dropped(path)) if lost else dropped(path).exists()) == (lost or False)


def test_starting_anew_keeps_the_old_lines_elsewhere(path):
    write(MetricsLog(path), 1, 2)
    write(MetricsLog(path), 1)
    write(MetricsLog(path, resume_step=0), 1)
    assert steps(path) == [1]
    assert steps(dropped(path)) == [1, 2, 1]


def test_going_back_while_running(path):
    log = MetricsLog(path)
    write(log, 1, 2, 3, 4)
    assert log.rewind(2) == 2
    write(log, 3)
    assert steps(path) == [1, 2, 3]
    assert steps(dropped(path)) == [3, 4]


def test_lines_out_of_order_or_unreadable_are_set_aside_too(path):
    path.write_bytes(b'{"step": 1}\nrubbish\n{"step": 9}\n{"step": 2}\n{"step": "3"}\n[4]\n' + b"[" * 100_000 + b"\n")
    MetricsLog(path, resume_step=2)
    assert steps(path) == [1, 2]
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert dropped(path).read_bytes().startswith(b'rubbish\n{"step": 9}\n{"step": "3"}\n[4]\n[[[')


def test_a_long_torn_line_is_cut_whole(path):
    path.write_bytes(b'{"step": 1}\n' + b"x" * 200_000)
    JsonLines(path)
    assert path.read_bytes() == b'{"step": 1}\n'
    path.write_bytes(b"x" * 200_000)
    JsonLines(path)
    assert path.read_bytes() == b""


@pytest.mark.fault
def test_a_full_disk_warns_once_and_recovers(path, caplog, monkeypatch):
    """Row 15, with the injected error."""
    reset_faults()
    monkeypatch.setenv("GRAFT_FAULT", "log.append:2:enospc*,log.append:3:enospc*")
    with caplog.at_level(logging.WARNING):
        assert write(MetricsLog(path), 1, 2, 3, 4) == [True, False, False, True]
    reset_faults()
    assert steps(path) == [1, 4]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left on device" in caplog.text


@pytest.mark.fault
def test_a_disk_that_takes_half_a_line_keeps_none_of_it(path, caplog):
    """Row 15, refused by the operating system in the middle of a line."""
    log = MetricsLog(path)
    write(log, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
        assert write(log, 2, 3) == [False, False]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    write(log, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 4]
    assert len(caplog.records) == 1


@pytest.mark.fault
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_dev_full(tmp_path, caplog):
    """Row 15, with the device that is always full."""
    path = tmp_path / "events.jsonl"
    path.symlink_to("/dev/full")
    log = EventsLog(path)
    log.write("saved", step=1)
    log.write("saved", step=2)
    log.close()
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text


@pytest.mark.fault
@pytest.mark.parametrize("how", ["deleted", "rotated", "truncated", "folder made anew"])
def test_a_file_that_goes_away_is_made_again(tmp_path, how):
    """Row 44."""
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    log = MetricsLog(path)
    write(log, 1)
    if how == "deleted":
        path.unlink()
    elif how == "rotated":
        path.rename(path.with_name("metrics.jsonl.1"))
    elif how == "truncated":
        os.truncate(path, 0)
    else:
        path.parent.rename(tmp_path / "moved")
        path.parent.mkdir()
    assert write(log, 2, 3) == [True, True]
    assert steps(path) == [2, 3]


@pytest.mark.fault
def test_a_folder_that_goes_away_warns_once(tmp_path, caplog):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    log = MetricsLog(path)
    path.parent.rmdir()
    assert write(log, 1, 2) == [False, False]
    assert len(caplog.records) == 1


@pytest.mark.fault
def test_a_clock_that_jumps_back_changes_nothing_but_time(tmp_path, monkeypatch):
    """Row 44: steps order the records."""
    clock = iter([2e9, 1e9, 0.0])
    monkeypatch.setattr("time.time", lambda: next(clock))
    log = EventsLog(tmp_path / "events.jsonl")
    for step in (1, 2, 3):
        log.write("saved", {"checkpoint": f"step-{step}"}, step=step)
    records = read_lines(log.path)
    assert [record.pop("time") for record in records] == [{"unix": 2e9}, {"unix": 1e9}, {"unix": 0.0}]
    assert records == [{"event": "saved", "step": s, "checkpoint": f"step-{s}"} for s in (1, 2, 3)]


def test_events_survive_a_resume_whole(tmp_path):
    path = tmp_path / "events.jsonl"
    EventsLog(path).write("saved", step=5)
    with path.open("ab") as file:
        file.write(b'{"event": "sa')
    EventsLog(path).write("resumed", step=2)
    assert [(r["event"], r["step"]) for r in read_lines(path)] == [("saved", 5), ("resumed", 2)]


def test_sync_and_close_can_be_called_at_any_time(path):
    log = MetricsLog(path)
    log.sync()
    write(log, 1)
    log.sync()
    log.close()
    log.close()
    write(log, 2)
    assert steps(path) == [1, 2]


def test_reading_lines_of_a_file_that_is_not_there(path):
    assert read_lines(path) == []
