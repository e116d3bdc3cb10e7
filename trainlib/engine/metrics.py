"""Figures of a run on disk: metrics.jsonl, train.log and TensorBoard, one name each."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from trainlib.core.files import write_atomically

TRAIN_LOSS = "train/loss"  # nats a target
TRAIN_LR = "train/lr"  # of the first parameter group
TRAIN_GRAD_NORM = "train/grad_norm"  # before clipping
TRAIN_TOKENS = "train/tokens"  # real positions so far
TRAIN_SPEED = "train/tokens_per_second"
TRAIN_DATA_WAIT = "train/data_wait"  # share of the time
TRAIN_MFU = "train/mfu"  # share of the measured matmul peak
VAL_LOSS = "val/loss"
VAL_BITS_PER_BYTE = "val/bits_per_byte"
VAL_REWARD_ACCURACY = "val/reward_accuracy"  # share of pairs
VAL_REWARD_MARGIN = "val/reward_margin"  # mean
BASELINE = "baseline/"

PAGE = "is it going well?"


def charts(validation: list[str], baselines: list[str]) -> dict[str, list[str]]:
    """The names in each chart of the page, by title; no chart that the stage has no figures for.

    Of `validation`, the names that an evaluation gives, only those that all sets share are used.
    """
    lines = {
        "loss": [TRAIN_LOSS, VAL_LOSS],
        "bits per byte": [VAL_BITS_PER_BYTE, *(BASELINE + name for name in baselines)],
        "reward accuracy": [VAL_REWARD_ACCURACY],
        "reward margin": [VAL_REWARD_MARGIN],
        "learning rate": [TRAIN_LR],
        "gradient norm": [TRAIN_GRAD_NORM],
        "tokens per second": [TRAIN_SPEED],
        "MFU": [TRAIN_MFU],
        "share of time waiting for data": [TRAIN_DATA_WAIT],
    }
    return {title: names for title, names in lines.items()
            if not names[0].startswith("val/") or names[0] in validation}  # fmt: skip


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
        self._folder = folder
        path = folder / "metrics.jsonl"
        cut_back(path, -1 if resume_step is None else resume_step)
        self._metrics = path.open("a", encoding="utf-8")
        self._log = (folder / "train.log").open("a", encoding="utf-8")
        if resume_step is not None:
            self._line(f"resuming from step {resume_step}")
        purge = 0 if resume_step is None else resume_step + 1
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        self._baselines: dict[str, float] = {}
        self._has_page = False

    def add_baselines(self, baselines: dict[str, float]) -> None:
        """Write the baselines of val/bits_per_byte to baselines.json, and draw them as lines."""
        self._baselines = baselines
        if baselines and self.writes:
            write_atomically(self._folder / "baselines.json", json.dumps(baselines, indent=2))

    def write_step(self, step: int, values: dict[str, float], text: str) -> None:
        """Record a training step, with its line for people."""
        if self.writes:
            self.write(step, values)
            self._line(text)

    def write_evaluation(
        self, step: int, values: dict[str, float], samples: list[str], words: list[str]
    ) -> None:
        """Record an evaluation: its figures, the baselines at this step, what the model wrote.

        `words` are lines for people about it.
        """
        if not self.writes:
            return
        self.write(step, values)
        for line in words:
            self._line(line)
        for name, value in self._baselines.items():
            self._board.add_scalar(BASELINE + name, value, step)
        if samples:
            self._board.add_text("samples", as_markdown(samples), step)
        if not self._has_page:
            self._add_page(list(values))
        self._board.flush()  # A chart with its last point missing would mislead who looks now.

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

    def _add_page(self, validation: list[str]) -> None:
        # TensorBoard takes the names for regular expressions and matches their beginnings.
        lines = charts(validation, list(self._baselines))
        page = {title: ["Multiline", [f"{n}$" for n in names]] for title, names in lines.items()}
        self._board.add_custom_scalars({PAGE: page})
        self._has_page = True

    def _line(self, text: str) -> None:
        self._log.write(text + "\n")
        self._log.flush()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl; figures that were not finite are left out of theirs."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: v for name, v in json.loads(line).items() if v is not None} for line in lines]


def minutes_trained(rows: list[dict[str, float]]) -> list[float]:
    """Minutes of training at each line of read_metrics, start, evaluations and writing apart."""
    minutes, tokens, found = 0.0, 0.0, []
    for row in rows:
        if TRAIN_SPEED in row:
            minutes += (row[TRAIN_TOKENS] - tokens) / row[TRAIN_SPEED] / 60
            tokens = row[TRAIN_TOKENS]
        found.append(minutes)
    return found


def newly_passed(value: float, baselines: dict[str, float], passed: list[str]) -> dict[str, str]:
    """Baselines that a value lies below for the first time, with the words for it.

    None for uniform: a model that has learned nothing lies now above it, now below.
    """
    return {
        name: f"below the {name} line"
        for name, limit in sorted(baselines.items(), key=lambda item: -item[1])
        if value < limit and name not in passed and name != "uniform"
    }


def as_markdown(samples: list[str]) -> str:
    """Texts one below the other, in which nothing is taken for markup and no line break is lost.

    Not as code blocks: TensorBoard does not wrap their lines.
    """

    def plain(line: str) -> str:
        text = line.lstrip(" ")
        indent = "&nbsp;" * (len(line) - len(text))
        return indent + re.sub(r"[!-/:-@\[-`{-~]", lambda found: f"&#{ord(found[0])};", text)

    return "\n\n---\n\n".join(
        "  \n".join(plain(line) for line in text.splitlines()) for text in samples
    )


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
