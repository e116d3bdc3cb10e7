"""External requests to a run (signals, FINISH file, time limit), polled once per step."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from trainlib.core.distributed import PEERS, DistributedContext, peer_lost
from trainlib.core.errors import Stopped, UserError
from trainlib.core.terminal import finish_output
from trainlib.engine.optim import Schedule

log = logging.getLogger(__name__)
T = TypeVar("T")

SIGNALS = [s for s in signal.Signals if s.name in ("SIGTERM", "SIGINT", "SIGUSR1")]
MARGIN = 0.98  # Fraction of the remaining time to plan for: the time of a step varies.


@dataclass(frozen=True)
class Requests:
    """Requests received since the last step."""

    save: bool = False
    stop: bool = False
    finish: int | None = None  # The last step, if the learning rate must decay from now on.
    evaluate: bool = False  # True if eval_every_steps=auto evaluates now, with max_hours.


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
        """Return the last step if the decay must begin now or end earlier than planned."""
        left, now = self.left(), time.monotonic()
        if left is None:
            return None
        if self._first is None:
            self._first = (step, now)
            return None if left > 0 else step
        first_step, first_time = self._first
        per_step = (now - first_time) / max(1, step - first_step)
        left -= first_time - self._begin  # The end takes about as long as the start.
        if schedule.num_steps is None:
            steps_left = max(0, int(MARGIN * left / per_step))
            begins = steps_left <= schedule.config.decay_fraction * (step + steps_left)
            return step + steps_left if begins else None
        # The decay was planned with a margin, so it ends earlier only if steps have become slower.
        steps_left = max(0, int(left / per_step))
        return step + steps_left if step + steps_left < schedule.num_steps else None


class Control:
    """Signals, the FINISH file in the run folder, and the clock.

    SIGTERM and SIGINT: save a checkpoint and stop. SIGUSR1: save a checkpoint and continue. FINISH:
    decay the learning rate from now on, for decay_fraction of the steps done so far, then finish.
    A signal to one rank counts for all ranks. Everything else is decided by rank 0.
    """

    def __init__(self, folder: Path, clock: Clock, distributed: DistributedContext) -> None:
        self._finish_file, self._clock, self._distributed = folder / "FINISH", clock, distributed
        self._save = self._stop = False
        self._together = True  # False once no rank waits for another one in a step.

    def __enter__(self) -> Control:
        self._together = True
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        if PEERS:
            received, self._wakeup = os.pipe()
            os.set_blocking(self._wakeup, False)
            signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(received,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._together = False
        if signal.set_wakeup_fd(-1) >= 0:
            os.close(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _watch(self, received: int) -> None:
        """End this rank, which may wait in a collective, if a stop is requested and one is lost."""
        for number in iter(lambda: os.read(received, 1), b""):
            while self._together and number[0] in (signal.SIGTERM, signal.SIGINT):
                if peer_lost(0.2):
                    text = "a rank is lost, so this one ends without a checkpoint"
                    print(f"rank {self._distributed.rank}: {text}", file=sys.stderr)
                    finish_output()
                    os._exit(128 + number[0])

    def _on_signal(self, number: int, frame: object) -> None:
        """Record a signal; a SIGINT after a stop request raises KeyboardInterrupt."""
        if signal.Signals(number).name == "SIGUSR1":
            self._save = True
        elif self._stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self._stop = True

    def poll(self, step: int, schedule: Schedule) -> Requests:
        """Return the current requests; each request to save or finish is returned only once."""
        requests = Requests(self._save, self._stop)
        if self._distributed.is_main:
            _refuse_if_gone(self._finish_file.parent)
            evaluate = schedule.num_steps is None and self._clock.evaluation_due()
            requests = Requests(self._save, self._stop, self._finish(step, schedule), evaluate)
        ranks = self._distributed.all_gather_object(requests)
        save, stop = any(r.save for r in ranks), any(r.stop for r in ranks)
        requests = replace(ranks[0], save=save, stop=stop)
        self._together = self._together and not (stop or schedule.reached(step))
        if requests.stop:
            log.info("stopping after step %d: saving a checkpoint", step)
        self._save = False
        return requests

    def between(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield this rank's batches, of which others may have more; raise Stopped on request."""
        for batch in itertools.chain(batches, itertools.repeat(None)):
            gathered = self._distributed.all_gather_object((self._stop, batch is not None))
            if any(stop for stop, _ in gathered):
                raise Stopped("stopped; rerun the command to continue")
            if not any(more for _, more in gathered):
                return
            if batch is not None:
                yield batch

    def _finish(self, step: int, schedule: Schedule) -> int | None:
        """Return the last step if the FINISH file or the clock requests the end, else None."""
        if self._finish_file.exists() and schedule.decay is None:
            # Keep the file: a run that is killed before its next checkpoint needs it again.
            end = step + max(1, round(schedule.config.decay_fraction * step))
            if schedule.num_steps is None or end < schedule.num_steps:
                return end
            log.info("FINISH ignored: the run ends at step %d anyway", schedule.num_steps)
            self._finish_file.unlink()
            return None
        return self._clock.plan(step, schedule)


def _refuse_if_gone(folder: Path) -> None:
    """Raise UserError if the run folder does not exist."""
    with contextlib.suppress(OSError):  # Of a file system that does not answer.
        if not folder.exists():
            text = f"{folder} was moved or removed during the run, so nothing more is written. "
            fix = "Move it back, then rerun the command to resume from its last checkpoint."
            raise UserError(text + fix)
