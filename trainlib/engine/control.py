"""External requests to a run (signals, FINISH file, time limit), polled once per step."""

from __future__ import annotations

import logging
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainlib.core.distributed import DistributedContext
from trainlib.engine.optim import Schedule

log = logging.getLogger(__name__)

MARGIN = 0.98
"""Share of the remaining time that a plan uses, because steps differ in length."""


@dataclass(frozen=True)
class Requests:
    """Requests since the last step."""

    save: bool = False
    stop: bool = False
    finish: int | None = None
    """The last step, if the learning rate is to decay from now on."""


class Clock:
    """The time that a run has taken, before resumes too, and the time that it has left."""

    def __init__(self, max_hours: float = 0) -> None:
        self._begin, self.earlier = time.monotonic(), 0.0
        self._max_seconds = max_hours * 3600
        self._first: tuple[int, float] | None = None

    def seconds(self) -> float:
        """Return the seconds of this run so far, those before a resume included."""
        return self.earlier + time.monotonic() - self._begin

    def left(self) -> float | None:
        """Return the seconds left; None for a run whose length is not a time."""
        return self._max_seconds - self.seconds() if self._max_seconds else None

    def plan(self, step: int, schedule: Schedule) -> int | None:
        """Return the last step, if the decay has to begin now or to end earlier than planned.

        The decay takes decay_fraction of all steps. As much time is reserved for the end, which
        has an evaluation and final/, as the start took, which had an evaluation and a compilation.
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
            due = steps_left <= schedule.config.decay_fraction * (step + steps_left)
            return step + steps_left if due else None
        # The decay has begun with a margin, so only a run that became slower ends earlier.
        steps_left = max(0, int(left / per_step))
        return step + steps_left if step + steps_left < schedule.num_steps else None


class Control:
    """Signals, the file FINISH in the run's folder, and the clock.

    SIGTERM and SIGINT: save a checkpoint and stop. SIGUSR1: save a checkpoint and continue. SIGHUP,
    which a closed terminal sends, is ignored (trainlib.engine.launch). FINISH: decay the learning
    rate from now on, over decay_fraction of the steps done so far, then finish. Rank 0 decides for
    all ranks.
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
        """Record a signal; a second SIGINT interrupts at once."""
        if number == getattr(signal, "SIGUSR1", None):
            self._save = True
        elif self._stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self._stop = True

    def poll(self, step: int, schedule: Schedule) -> Requests:
        """Return the current requests; a request to save or to finish is returned once."""
        requests = Requests()
        if self._distributed.is_main:
            requests = Requests(self._save, self._stop, self._finish(step, schedule))
        requests = self._distributed.broadcast_object(requests)
        if requests.stop:
            log.info("stopping after step %d: saving a checkpoint", step)
        self._save = False
        return requests

    def _finish(self, step: int, schedule: Schedule) -> int | None:
        """Return the last step, if the FINISH file or the clock asks for one."""
        if self._finish_file.exists() and schedule.decay is None:
            # The file stays: a run that is killed before its next checkpoint needs it again.
            end = step + max(1, round(schedule.config.decay_fraction * step))
            if schedule.num_steps is not None and end >= schedule.num_steps:
                log.info("FINISH: the run ends at step %d anyway", schedule.num_steps)
                self._finish_file.unlink()
                return None
            return end
        return self._clock.plan(step, schedule)
