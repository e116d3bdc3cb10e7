"""What the outside asks of a run: stop, or save. Read in one place, once a step."""

from __future__ import annotations

import logging
import signal
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Requests:
    """What was asked for since the last step."""

    save: bool
    stop: bool


class Control:
    """SIGTERM and SIGINT: checkpoint and stop; SIGUSR1: checkpoint and go on."""

    def __init__(self) -> None:
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
        if number == getattr(signal, "SIGUSR1", None):
            self._save = True
        elif self._stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self._stop = True

    def poll(self, step: int) -> Requests:
        """What is asked for now; a request to save is answered once."""
        requests = Requests(self._save, self._stop)
        if self._stop:
            log.info("stopping after step %d: saving a checkpoint", step)
        self._save = False
        return requests
