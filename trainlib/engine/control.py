"""External requests to a run (signals, FINISH file, time limit), polled once per step."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainlib.core.distributed import DistributedContext
from trainlib.engine.optim import Schedule

log = logging.getLogger(__name__)

MARGIN = 0.98
"""Fraction of the remaining time to plan for, because the time of a step varies."""


@dataclass(frozen=True)
class Requests:
    """Requests received since the last step."""

    save: bool = False
    stop: bool = False
    finish: int | None = None
    """The last step of the run, if the learning rate must decay from now on; else None."""
    evaluate: bool = False
    """True if eval_every_steps=auto evaluates now, in a run whose number of steps is unknown."""


class Clock:
    """Elapsed time of a run, including the time before resumes, and its remaining time."""

    def __init__(self, max_hours: float = 0) -> None:
        self._begin, self.earlier = time.monotonic(), 0.0
        self._max_seconds = max_hours * 3600
        self._first: tuple[int, float] | None = None
        self._next_evaluation = self._evaluation_seconds = 0.0

    def seconds(self) -> float:
        """Return the elapsed seconds of this run, including those before a resume."""
        return self.earlier + time.monotonic() - self._begin

    def left(self) -> float | None:
        """Return the seconds left, or None for a run without a time limit."""
        return self._max_seconds - self.seconds() if self._max_seconds else None

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Time an evaluation; the next is due after a tenth of max_hours, or 9 times as long."""
        begin = self.seconds()
        yield
        end = self.seconds()
        self._evaluation_seconds += end - begin
        self._next_evaluation = end + max(self._max_seconds / 10, 9 * (end - begin))

    def evaluation_due(self) -> bool:
        """Return whether a run with a time limit should evaluate now."""
        return bool(self._max_seconds) and self.seconds() >= self._next_evaluation

    def evaluation_share(self) -> float:
        """Return the fraction of the time since the start or resume spent in evaluations."""
        return self._evaluation_seconds / (time.monotonic() - self._begin)

    def plan(self, step: int, schedule: Schedule) -> int | None:
        """Return the last step if the decay must begin now or end earlier than planned, else None.

        The decay takes decay_fraction of all steps. The end (evaluation, writing final/) is
        allotted as much time as the start took (compilation, evaluation).
        """
        left, now = self.left(), time.monotonic()
        if left is None:
            return None
        if self._first is None:
            self._first = (step, now)
            return None if left > 0 else step
        first_step, first_time = self._first
        per_step = (now - first_time) / max(1, step - first_step)
        left -= first_time - self._begin
        if schedule.num_steps is None:
            steps_left = max(0, int(MARGIN * left / per_step))
            begins = steps_left <= schedule.config.decay_fraction * (step + steps_left)
            return step + steps_left if begins else None
        # The decay was planned with a margin, so it ends earlier only if steps have become slower.
        steps_left = max(0, int(left / per_step))
        return step + steps_left if step + steps_left < schedule.num_steps else None


class Control:
    """Signals, the FINISH file in the run folder, and the clock.

    SIGTERM and SIGINT: save a checkpoint and stop. SIGUSR1: save a checkpoint and continue. SIGHUP,
    sent when a terminal is closed, is ignored (trainlib.core.terminal). FINISH: decay the learning
    rate from now on, for decay_fraction of the number of steps done so far, then finish the run.
    Rank 0 decides for all ranks.
    """

    def __init__(self, folder: Path, clock: Clock, distributed: DistributedContext) -> None:
        self._finish_file, self._clock, self._distributed = folder / "FINISH", clock, distributed
        self._save = self._stop = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Control:
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            number = getattr(signal, name, None)
            if number is not None:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        """Record a signal; a SIGINT after a stop request raises KeyboardInterrupt."""
        if number == getattr(signal, "SIGUSR1", None):
            self._save = True
        elif self._stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self._stop = True

    def poll(self, step: int, schedule: Schedule) -> Requests:
        """Return the current requests; each request to save or finish is returned only once."""
        requests = Requests()
        if self._distributed.is_main:
            evaluate = schedule.num_steps is None and self._clock.evaluation_due()
            requests = Requests(self._save, self._stop, self._finish(step, schedule), evaluate)
        requests = self._distributed.broadcast_object(requests)
        if requests.stop:
            log.info("stopping after step %d: saving a checkpoint", step)
        self._save = False
        return requests

    def _finish(self, step: int, schedule: Schedule) -> int | None:
        """Return the last step if the FINISH file or the clock requests the end, else None."""
        if self._finish_file.exists() and schedule.decay is None:
            # Keep the file: a run that is killed before its next checkpoint needs it again.
            end = step + max(1, round(schedule.config.decay_fraction * step))
            if schedule.num_steps is not None and end >= schedule.num_steps:
                log.info("FINISH ignored: the run ends at step %d anyway", schedule.num_steps)
                self._finish_file.unlink()
                return None
            return end
        return self._clock.plan(step, schedule)
