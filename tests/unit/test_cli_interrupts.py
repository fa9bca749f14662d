"""Ctrl-C during imports: KeyboardInterrupt, even when a library makes something else of it."""

import contextlib
import os
import signal

import pytest

from shoal.cli.interrupts import noticing_interrupts


def test_plain():
    with pytest.raises(KeyboardInterrupt), noticing_interrupts(signal.SIGINT):
        os.kill(os.getpid(), signal.SIGINT)


def import_that_fails_when_interrupted():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        raise ImportError("half a module") from None


def import_that_swallows_the_interrupt():
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "work", [import_that_fails_when_interrupted, import_that_swallows_the_interrupt]
)
def test_turned_into_something_else(work):
    with pytest.raises(KeyboardInterrupt), noticing_interrupts(signal.SIGTERM):
        work()


def test_errors_without_a_signal_stay_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ImportError), noticing_interrupts(signal.SIGINT):
        raise ImportError("no such module")
    assert signal.getsignal(signal.SIGINT) is before
