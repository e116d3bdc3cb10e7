"""Figures of a run on disk: metrics.jsonl, train.log and TensorBoard, one name each."""

from __future__ import annotations

import json
import math
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from trainlib.files import write_atomically


class MetricsLog:
    """The three records of a run.

    On resume from a step, metrics.jsonl loses what came after it (and a torn last line), so that
    each step has one training line and one validation line at most. Of several ranks only the
    first has `writes`.
    """

    def __init__(self, folder: Path, resume_step: int | None, writes: bool = True) -> None:
        self.writes = writes
        if not writes:
            return
        self._path = folder / "metrics.jsonl"
        cut_back(self._path, -1 if resume_step is None else resume_step)
        self._metrics = self._path.open("a", encoding="utf-8")
        self._log = (folder / "train.log").open("a", encoding="utf-8")
        if resume_step is not None:
            self._line(f"resuming from step {resume_step}")
        purge = 0 if resume_step is None else resume_step + 1
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write_step(self, step: int, values: dict[str, float], text: str) -> None:
        """Record a training step, with its line for people."""
        if self.writes:
            self.write(step, values)
            self._line(text)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record figures of a step; one that is not finite becomes null."""
        if not self.writes:
            return
        plain = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self._metrics.write(json.dumps({"step": step, **plain}) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close all three."""
        if not self.writes:
            return
        self._metrics.close()
        self._log.close()
        self._board.close()

    def _line(self, text: str) -> None:
        self._log.write(text + "\n")
        self._log.flush()


def cut_back(path: Path, step: int) -> None:
    """Keep the lines of a metrics file up to a step, whole ones only."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # Torn by a kill in the middle of a line, or by a power cut.
    write_atomically(path, "".join(kept))
