"""Fail-points fire where, when and as often as they are told to, and nowhere else."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from graft.errors import ConfigError
from graft.faults import InjectedFault, fault_active, fault_point


def test_nothing_happens_without_the_variable(monkeypatch):
    monkeypatch.delenv("GRAFT_FAULT", raising=False)
    fault_point("anywhere", 3)
    assert fault_active("anywhere", 3) is None


def test_fires_only_at_its_site_and_step_and_only_once(inject):
    inject("here:3:raise")
    fault_point("there", 3)
    fault_point("here", 2)
    fault_point("here")
    with pytest.raises(InjectedFault, match="here:3:raise"):
        fault_point("here", 3)
    fault_point("here", 3)


def test_a_star_fires_every_time_and_a_star_step_at_any_step(inject):
    inject("here:*:enospc*")
    for step in (1, 1, 2, None):
        with pytest.raises(OSError, match="No space left") as caught:
            fault_point("here", step)
        assert caught.value.errno == errno.ENOSPC


def test_several_faults_are_independent(inject):
    inject("a:1:raise, b:2:enospc")
    with pytest.raises(OSError, match="No space left"):
        fault_point("b", 2)
    with pytest.raises(InjectedFault):
        fault_point("a", 1)


def test_only_the_named_rank_fails(inject, monkeypatch):
    inject("here:1:raise:1")
    fault_point("here", 1)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(InjectedFault):
        fault_point("here", 1)


def test_asked_kinds_are_left_to_the_caller_and_used_up_by_asking(inject):
    inject("loss:4:nan,grad:*:inf*")
    fault_point("loss", 4)
    assert fault_active("loss", 3) is None
    assert fault_active("loss", 4) == "nan"
    assert fault_active("loss", 4) is None
    assert [fault_active("grad", s) for s in (1, 2)] == ["inf", "inf"]


def test_sleep_takes_its_seconds(inject):
    inject("here:1:sleep=0.05")
    start = time.monotonic()
    fault_point("here", 1)
    assert time.monotonic() - start >= 0.05


def test_term_reaches_the_handler(inject):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        inject("here:1:term")
        fault_point("here", 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


def test_corrupt_flips_exactly_one_bit(inject, tmp_path):
    file = tmp_path / "data"
    file.write_bytes(bytes(range(101)))
    inject("written:1:corrupt")
    fault_point("written", 1, path=file)
    differing = [a ^ b for a, b in zip(bytes(range(101)), file.read_bytes(), strict=True) if a != b]
    assert differing == [1]


def test_corrupt_without_a_file_is_an_error(inject):
    inject("here:1:corrupt")
    with pytest.raises(ConfigError, match="no file is written at here"):
        fault_point("here", 1)


@pytest.mark.parametrize(
    "text", ["here:1", "here:1:explode", "here:one:raise", "here:1:raise=3", "here:1:sleep=x", ":1:raise"]
)
def test_a_fault_that_could_never_fire_is_an_error(inject, text):
    inject(text)
    with pytest.raises(ConfigError, match="GRAFT_FAULT"):
        fault_point("elsewhere", 0)


@pytest.mark.parametrize(("kind", "returncode"), [("exit", 1), ("kill", -signal.SIGKILL)])
def test_exit_and_kill_end_the_process_without_clean_up(kind, returncode):
    code = (
        "import sys; from graft.faults import fault_point\n"
        "try: fault_point('here', 1)\n"
        "finally: print('cleaned up')\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "GRAFT_FAULT": f"here:1:{kind}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (returncode, "", "")
