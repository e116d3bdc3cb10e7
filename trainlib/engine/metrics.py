"""Write a run's metrics to metrics.jsonl, train.log and TensorBoard."""

import contextlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from trainlib.core.files import write_atomically
from trainlib.engine.board import Board

log = logging.getLogger(__name__)

TRAIN_LOSS = "train/loss"  # nats per target
TRAIN_LR = "train/lr"  # of the first parameter group
TRAIN_GRAD_NORM = "train/grad_norm"  # before clipping
TRAIN_TOKENS = "train/tokens"  # positions so far, without padding
TRAIN_SPEED = "train/tokens_per_second"
TRAIN_DATA_WAIT = "train/data_wait"  # fraction of the time
TRAIN_MFU = "train/mfu"  # fraction of the measured matmul peak
VAL_LOSS = "val/loss"
VAL_BITS_PER_BYTE = "val/bits_per_byte"
VAL_REWARD_ACCURACY = "val/reward_accuracy"  # fraction of pairs
BASELINE = "baseline/"


class MetricsLog:
    """Writer of metrics.jsonl, train.log, baselines.json and TensorBoard.

    Resuming from a step removes later lines and a truncated last line from metrics.jsonl, so each
    step has at most one training line and one validation line.
    """

    def __init__(
        self, folder: Path, resume_step: int | None, baselines: dict[str, float] | None = None,
        last_evaluation: int | None = None,
    ) -> None:  # fmt: skip
        self._baselines, self._reported = baselines or {}, False
        if baselines:
            text = json.dumps(baselines, indent=2)
            self._record(write_atomically, folder / "baselines.json", text)
        path = folder / "metrics.jsonl"
        truncate_metrics(path, -1 if resume_step is None else resume_step, last_evaluation)
        self._metrics = path.open("a", encoding="utf-8")
        self._log = (folder / "train.log").open("a", encoding="utf-8")
        if resume_step is not None:
            self.write_lines([f"resuming from step {resume_step}"])
        evaluated: dict[str, tuple[int, float]] = {}
        for row in read_metrics(folder):
            evaluated |= {k: (int(row["step"]), v) for k, v in row.items() if k.startswith("val/")}
        self._board = Board(folder / "tensorboard", resume_step, evaluated)
        self._record(self._board.open)

    def write_step(self, step: int, values: dict[str, float], text: str) -> None:
        """Record a training step, with its line in train.log."""
        self.write(step, values)
        self._record(self._board.add, step, values)
        self.write_lines([text])

    def write_evaluation(
        self, step: int, values: dict[str, float], samples: list[str], log_lines: list[str]
    ) -> None:
        """Record an evaluation: its metrics, baselines, samples, and lines in train.log."""
        self.write(step, values)
        lines = [f"sample step {step} {one_line(text)}" for text in samples]
        self.write_lines([*lines, *log_lines])
        # "uniform" is omitted: its line would compress the others.
        baselines = {BASELINE + k: v for k, v in self._baselines.items() if k != "uniform"}
        shown = {**values, **baselines}
        self._record(self._board.add_evaluation, step, shown, as_markdown(samples))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a line to metrics.jsonl; non-finite values become null."""
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self._append(self._metrics, json.dumps({"step": step, **finite}) + "\n")

    def close(self) -> None:
        """Flush and close all outputs."""
        for output in (self._metrics, self._log, self._board):
            self._record(output.close)

    def write_lines(self, lines: list[str]) -> None:
        """Append lines to train.log."""
        self._append(self._log, "".join(line + "\n" for line in lines))

    def _append(self, file: TextIO, text: str) -> None:
        self._record(file.write, text)
        self._record(file.flush)

    def _record(self, action: Callable[..., object], *arguments: Any) -> None:
        """Report the first record that cannot be written; the run itself is in its checkpoints."""
        try:
            action(*arguments)
        except OSError as error:
            if not self._reported:
                log.warning("a record of the run could not be written (%s); it goes on", error)
            self._reported = True


class NoMetricsLog(MetricsLog):
    """A metrics writer that does nothing, for ranks other than 0."""

    def __init__(self) -> None: ...

    write_step = write_evaluation = close = lambda *_: None  # type: ignore


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a run's metrics.jsonl, without values that were not finite."""
    rows = _complete_rows(folder / "metrics.jsonl")
    return [{name: v for name, v in row.items() if v is not None} for row in rows]


def _complete_rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "step" in row:
                yield row


def newly_passed(value: float, baselines: dict[str, float], passed: list[str]) -> list[str]:
    """Return the baselines that a value falls below for the first time, the largest first."""
    names = sorted(baselines.keys() - {"uniform", *passed}, key=lambda name: -baselines[name])
    return [name for name in names if value < baselines[name]]


def one_line(text: str) -> str:
    """Return a text without its last line breaks, and with the others escaped."""
    return text.rstrip().replace("\n", "\\n")


def as_markdown(samples: list[str]) -> str:
    """Join texts as Markdown, with markup escaped and line breaks preserved."""

    def escape(line: str) -> str:
        text = line.lstrip(" ")
        indent = "&nbsp;" * (len(line) - len(text))
        return indent + re.sub(r"[!-/:-@\[-`{-~]", lambda found: f"&#{ord(found[0])};", text)

    texts = ("  \n".join(map(escape, text.splitlines())) for text in samples)
    return "\n\n---\n\n".join(texts)


def truncate_metrics(path: Path, step: int, last_evaluation: int | None = None) -> None:
    """Remove rows after a step from a metrics file, and evaluations after `last_evaluation`."""
    evaluated = step if last_evaluation is None else min(step, last_evaluation)
    if path.exists():
        rows = _complete_rows(path)
        kept = (row for row in rows if row["step"] <= (evaluated if VAL_LOSS in row else step))
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
