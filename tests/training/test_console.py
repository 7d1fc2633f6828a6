"""Plain lines without a terminal, a progress bar with one, and a log file that may fail."""

from __future__ import annotations

import io

import pytest

from graft.training.console import Console, describe, duration, short

LINE = {
    "loss": 2.34567,
    "learning_rate": 3e-4,
    "grad_norm": 0.5,
    "time": {"tokens_per_second": 12345.0, "mfu": 0.42, "memory_bytes": 2**30, "seconds_left": 3661.0},
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_numbers_are_readable():
    assert [short(x) for x in (54_538_752, 1e12, 999, 0)] == ["54.5M", "1T", "999", "0"]
    assert duration(3661.9) == "1:01:01"
    assert describe(LINE, {}) == (
        "loss 2.3457  lr 3.00e-04  grad norm 0.5  12.3k tokens/s  MFU 42 %  1.00 GiB  1:01:01 left"
    )
    assert describe({"loss": None, "time": {}}, {}) == ""
    assert describe({"loss": 1.5, "time": {}}, {"leaks_future": True}) == "loss 1.5000  (leaks_future)"
    assert describe({"loss": 1.5, "noted": True, "time": {}}, {}) == "loss 1.5000", "a value is no mark"


def test_without_a_terminal_everything_is_a_plain_line_and_kept_in_the_log(tmp_path):
    stream = io.StringIO()
    with Console(tmp_path / "train.log", stream) as console:
        console.start_progress(0, 10)
        console.advance(1)
        console.say("hello [bold]")
        console.show(2, 10, LINE, {})
    assert stream.getvalue() == (tmp_path / "train.log").read_text()
    assert stream.getvalue().splitlines() == ["hello [bold]", f"step 2/10  {describe(LINE, {})}"]


def test_on_a_terminal_there_is_a_bar_with_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    with Console(tmp_path / "train.log", stream) as console:
        console.start_progress(0, 10)
        console.show(2, 10, LINE, {})
        console.say("hello")
        console.show(3, 10, LINE, {"leaks_future": True})
    console.say("afterwards")
    assert "3/10" in stream.getvalue()
    assert "left  (leaks_future)" in stream.getvalue()
    assert "loss 2.3457" in stream.getvalue()
    assert "hello" in stream.getvalue()
    assert (tmp_path / "train.log").read_text().splitlines() == [
        f"step 2/10  {describe(LINE, {})}",
        "hello",
        f"step 3/10  {describe(LINE, {})}  (leaks_future)",
        "afterwards",
    ]


@pytest.mark.fault
def test_a_log_that_cannot_be_written_costs_one_warning():  # fault 15
    from pathlib import Path

    stream = io.StringIO()
    console = Console(Path("/dev/full"), stream)
    for i in range(3):
        console.say(f"line {i}")
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if line.startswith("line")] == ["line 0", "line 1", "line 2"]
    assert len([line for line in lines if "given up" in line]) == 1
