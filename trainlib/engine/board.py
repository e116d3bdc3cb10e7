"""TensorBoard's files of a run, written for the default settings of its page.

The page draws one line for each folder ("run") that has a tag, named after the folder. It sorts the
tags, opens the first two groups, and smooths with a factor of 0.6. So the lines of a chart have one
tag in several folders, the main charts are numbered, and evaluations have additional points.
"""

import math
import threading
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

CHARTS = (
    *("bits_per_byte", "loss", "exact_match", "lr", "grad_norm", "tokens_per_second", "data_wait"),
    *("reward_margin", "reward_accuracy"),
)
"""The metrics in the first group of the page, in this order."""
GAP = 0.005
MAX_POINTS = 256  # The page keeps 1,000 points of a line.


def report_thread(failure: Any) -> None:
    """Replace threading.excepthook: the next call of a SummaryWriter raises its thread's error."""
    if not type(failure.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(failure)


threading.excepthook = report_thread


def place(name: str) -> tuple[str, str]:
    """Return the run and the tag that show a metric: lines with the same tag share a chart."""
    set_, _, metric = name.partition("/")
    run, suffix = {"val": "validation"}.get(set_, set_), ""
    if set_ == "baseline":
        run, metric = metric, "bits_per_byte"
    elif metric.startswith("skills/") and metric.count("/") > 1:
        _, run, *column, metric = metric.split("/")
        suffix = "".join(f" {word}" for word in column)
    if metric not in CHARTS or name == "train/bits_per_byte":  # train/loss shows the same.
        return run, name
    return run, f"overview/{CHARTS.index(metric) + 1} {metric}{suffix}"


class Board:
    """Writer of TensorBoard's files; `evaluated` has each metric's last evaluation."""

    def __init__(
        self, folder: Path, resume_step: int | None, evaluated: dict[str, tuple[int, float]]
    ) -> None:
        self._folder, self._evaluated = folder, evaluated
        self._writers: dict[str, SummaryWriter] = {}
        self._last_step = -1 if resume_step is None else resume_step
        self._last_evaluation = max((step for step, _ in evaluated.values()), default=-1)

    def open(self) -> None:
        """Remove the points after the step of the resume."""
        for path in self._folder.glob("*/"):
            self._writer(path.name)

    def _writer(self, run: str) -> SummaryWriter:
        if run not in self._writers:
            # Points between the last evaluation and the resume lead to an evaluation after it.
            last = self._last_step if run == "train" else self._last_evaluation
            self._writers[run] = SummaryWriter(str(self._folder / run), purge_step=last + 1)
        return self._writers[run]

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add a point to each metric's line."""
        for name, value in values.items():
            run, tag = place(name)
            self._writer(run).add_scalar(tag, value, step)

    def add_evaluation(self, step: int, values: dict[str, float], text: str) -> None:
        """Extend each metric's line from its last evaluation to this one, and add the samples.

        The page smooths over points, not over steps: a falling line of ten points would end far
        above its last value. Additional points on the straight line between two evaluations, GAP
        apart, do not change the line, and let the smoothed one end within 1.5 GAP of the value.
        """
        for name, value in values.items():
            run, tag = place(name)
            begin, before = self._evaluated.get(name, (step, value))
            change, count = value - before, 1
            if math.isfinite(change) and step > begin:
                count = min(max(1, math.ceil(abs(change) / GAP)), MAX_POINTS)
            for i in range(1, count + 1):
                at = begin + math.ceil((step - begin) * i / count)
                shown = value if at == step else before + change * (at - begin) / (step - begin)
                self._writer(run).add_scalar(tag, shown, at)
            self._evaluated[name] = step, value
        if text:
            self._writer("validation").add_text("samples", text, step)
        for writer in self._writers.values():
            writer.flush()  # Otherwise the charts would lack the last point.

    def close(self) -> None:
        """Flush and close all files."""
        for writer in self._writers.values():
            writer.close()
