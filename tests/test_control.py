"""Protects stopping: a signal is only noted, and read in one place; handlers are put back."""

from __future__ import annotations

import logging
import os
import signal

import pytest

from trainlib.control import Control, Requests


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_nothing_is_asked_for_at_first():
    with Control() as control:
        assert control.poll(1) == Requests(save=False, stop=False)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_asks_to_stop_and_says_so(name, caplog):
    caplog.set_level(logging.INFO)
    with Control() as control:
        send(getattr(signal, name))
        assert control.poll(7) == Requests(save=False, stop=True)
        assert "stopping after step 7: saving a checkpoint" in caplog.text


def test_the_second_interrupt_ends_at_once():
    with Control() as control:
        send(signal.SIGTERM)
        send(signal.SIGTERM)  # Schedulers repeat it: the checkpoint must still be written.
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
            control.poll(1)


def test_sigusr1_asks_once_for_a_checkpoint():
    with Control() as control:
        send(signal.SIGUSR1)
        assert control.poll(1) == Requests(save=True, stop=False)
        assert control.poll(2) == Requests(save=False, stop=False)


def test_the_handlers_are_put_back_whatever_happens():
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(RuntimeError), Control():
        assert all(signal.getsignal(n) != b for n, b in zip(numbers, before, strict=True))
        raise RuntimeError
    assert [signal.getsignal(number) for number in numbers] == before
