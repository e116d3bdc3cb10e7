"""Tests for stop requests: signals are recorded, polled, and their handlers restored."""

from __future__ import annotations

import logging
import os
import signal

import pytest

from trainlib.core.distributed import DistributedContext
from trainlib.engine.control import Clock, Control, Requests
from trainlib.engine.optim import OptimConfig, Schedule

SCHEDULE = Schedule(OptimConfig(), 100)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_there_is_no_request_at_first(tmp_path):
    with Control(tmp_path, Clock(), DistributedContext()) as control:
        assert control.poll(1, SCHEDULE) == Requests(save=False, stop=False)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_requests_a_stop_and_is_logged(name, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    with Control(tmp_path, Clock(), DistributedContext()) as control:
        send(getattr(signal, name))
        assert control.poll(7, SCHEDULE) == Requests(save=False, stop=True)
        assert "stopping after step 7: saving a checkpoint" in caplog.text


def test_an_interrupt_after_a_stop_request_raises_immediately(tmp_path):
    with Control(tmp_path, Clock(), DistributedContext()) as control:
        send(signal.SIGTERM)
        send(signal.SIGTERM)  # Schedulers repeat SIGTERM; the checkpoint must still be written.
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
            control.poll(1, SCHEDULE)


def test_sigusr1_requests_one_checkpoint(tmp_path):
    with Control(tmp_path, Clock(), DistributedContext()) as control:
        send(signal.SIGUSR1)
        assert control.poll(1, SCHEDULE) == Requests(save=True, stop=False)
        assert control.poll(2, SCHEDULE) == Requests(save=False, stop=False)


def test_signal_handlers_are_restored_after_an_error(tmp_path):
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(RuntimeError), Control(tmp_path, Clock(), DistributedContext()):
        assert all(signal.getsignal(n) != b for n, b in zip(numbers, before, strict=True))
        raise RuntimeError
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_finish_file_starts_the_decay_only_once(tmp_path):
    schedule = Schedule(OptimConfig(decay_fraction=0.25), None)
    with Control(tmp_path, Clock(), DistributedContext()) as control:
        (tmp_path / "FINISH").touch()
        assert control.poll(40, schedule) == Requests(finish=50)
        schedule.begin_decay(40, 50)
        assert control.poll(41, schedule) == Requests()
        # A run that is killed before the next checkpoint resumes and finds the request again.
        assert control.poll(30, Schedule(OptimConfig(decay_fraction=0.5), None)).finish == 45


def test_a_finish_file_never_extends_a_run(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with Control(tmp_path, Clock(), DistributedContext()) as control:
        (tmp_path / "FINISH").touch()
        assert control.poll(90, SCHEDULE).finish is None
        assert "ends at step 100 anyway" in caplog.text


class Time:
    """A clock that the test advances."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch):
    time = Time()
    monkeypatch.setattr("trainlib.engine.control.time", time)
    return time


@pytest.mark.parametrize("slow", [1.0, 2.0])
def test_a_run_with_a_time_limit_ends_in_time(time, slow):
    """The limit is one hour. The start takes 100 s, and a step 2 s, or 4 s in a slow decay."""
    clock, schedule, step = Clock(max_hours=1), Schedule(OptimConfig(), None), 0
    time.now += 100
    while not schedule.reached(step):
        time.now += 2.0 if schedule.num_steps is None else 2.0 * slow
        step += 1
        if (end := clock.plan(step, schedule)) is not None:
            schedule.begin_decay(step, end)
    used = time.now - 1000
    assert 3100 < used <= 3500, used  # The end is allotted as much time as the start.
    assert schedule.decay is not None and schedule.factor(step - 1) < 0.05
    if slow == 1:
        assert schedule.decay[0] == pytest.approx(step / 2, rel=0.05)  # decay_fraction is 0.5.


def test_time_before_a_resume_counts_toward_the_limit(time):
    clock = Clock(max_hours=1)
    clock.earlier = 3000
    time.now += 500
    assert clock.left() == pytest.approx(100)


def test_a_run_with_a_time_limit_evaluates_at_each_tenth_or_less_often(time, tmp_path):
    """With the first and the last one, evaluations of two minutes take a tenth of the hour."""
    for seconds, expected in ((3.0, 9), (120.0, 2)):
        clock, schedule, count = Clock(max_hours=1), Schedule(OptimConfig(), None), 0
        control = Control(tmp_path, clock, DistributedContext())
        with clock.evaluating():  # The first evaluation, before step 1.
            time.now += seconds
        for step in range(1, 10_000):
            time.now += 1.0
            if clock.left() <= 0:
                break
            if control.poll(step, Schedule(OptimConfig(), None)).evaluate:
                count += 1
                with clock.evaluating():
                    time.now += seconds
        assert count == expected
        assert clock.evaluation_share() < 0.13
        schedule.begin_decay(5, 10)
        assert not control.poll(6, schedule).evaluate  # The number of steps is known.


def test_a_run_without_a_time_limit_never_evaluates_by_time(time, tmp_path):
    time.now += 1e6
    control = Control(tmp_path, Clock(), DistributedContext())
    assert not control.poll(1, Schedule(OptimConfig(), None)).evaluate
