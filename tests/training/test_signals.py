"""The first signal is a request, the second an order, and afterwards everything is as it was."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from graft.training.signals import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered_and_the_work_goes_on(number):
    with StopRequest() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == signal.Signals(number).name


def guarded(number):
    """Code that shrugs off every ordinary failure."""
    try:
        os.kill(os.getpid(), number)
    except Exception:
        pytest.fail("an order to stop was taken for an ordinary failure")


@pytest.mark.parametrize("second", STOP_SIGNALS)
def test_the_second_signal_interrupts_even_code_that_catches_exceptions(second):
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            guarded(second)
        assert stop.reason == "SIGTERM"


def test_handlers_come_back_even_after_an_error():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]

    def fail():
        with StopRequest():
            assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_another_thread_installs_nothing():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    seen = []

    def work():
        with StopRequest() as stop:
            seen.append([signal.getsignal(number) for number in STOP_SIGNALS])
            seen.append(stop.reason)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, None]
