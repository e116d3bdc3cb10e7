"""What training costs beside the steps themselves: utilisation, checkpoints, start, memory.

    python -m bench.costs [NAME ...] [--peers .venv-peers] [--repeats 3]

    mfu          share of the best matrix product of that precision, measured in the same run: of
                 the first step as shipped, of 131,072 tokens, its data read and its kernels first
                 used; compiled, before it, where a long run is
    mfu_plain    the same, uncompiled
    mfu_fp32     the same in fp32, uncompiled
    checkpoint   share of training time when every 200th step is saved: what a save adds to the run
    start        seconds from the command to the first step, data cached, no compile; the evaluation
                 of one row and three samples that stand before it are in it
    memory       peak of a step of 8 rows of 512 over transformers' step, both with AdamW in fp32

The model is the default of 26.9M parameters where no other is named.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from bench.common import (
    PLACE,
    SAMPLE,
    base,
    own_cache,
    parser_of,
    peer,
    record,
    run,
    seconds_to_first_figure,
)
from bench.step import own_step
from bench.training import AS_LONG, LENGTH, ROWS
from tools.past_runs import minutes_trained
from trainlib.engine.metrics import TRAIN_MFU

DATA = SAMPLE / "pretrain.jsonl"
STEP = [f"tokens_per_step={ROWS * LENGTH}"]


def mfu(options: argparse.Namespace, name: str = "mfu", more: Sequence[str] = AS_LONG) -> None:
    """Of each run the first step."""
    found = []
    for _ in range(options.repeats):
        rows = run("train.py", DATA, "mfu", ["max_steps=1", *more])
        found += [row[TRAIN_MFU] for row in rows if TRAIN_MFU in row]
    record(name, found, ">= 0.65")


def mfu_plain(options: argparse.Namespace) -> None:
    """Where a long run is not compiled, it is the same as mfu."""
    mfu(options, "mfu_plain", ["compile=off"])


def mfu_fp32(options: argparse.Namespace) -> None:
    """Where bf16 is not chosen, it is the same as mfu_plain."""
    mfu(options, "mfu_fp32", ["compile=off", "precision=fp32"])


def checkpoint(options: argparse.Namespace) -> None:
    """Seconds of a run with a save after each step, less one without, over 200 steps' time."""

    def took(every: int) -> tuple[float, float]:
        words = [*STEP, "max_steps=10", f"save_every_steps={every}"]
        begin = time.perf_counter()
        rows = run("train.py", DATA, "saving", words)
        return time.perf_counter() - begin, 6 * minutes_trained(rows)[-1]

    found = []
    for _ in range(options.repeats):
        (with_saves, _), (without, a_step) = took(1), took(0)
        # The last step is saved in both.
        found.append((with_saves - without) / 9 / (200 * a_step))
    record("checkpoint", found, "< 0.01")


def start(options: argparse.Namespace) -> None:
    """From the command until the evaluation before the first step is written."""
    found = []
    for _ in range(options.repeats + 1):
        words = ["configs/pretrain.yaml", f"data.files={DATA}", "compile=off",
                 "data.val_max_rows=1", "max_steps=1", *STEP]  # fmt: skip
        found.append(seconds_to_first_figure(words, PLACE / "start", own_cache()))
    record("start", found[1:], "< 5 s")  # The first one tokenizes.


def memory(options: argparse.Namespace) -> None:
    """Ours through the loss of train.py, every position a label."""
    mine = own_step(base(), ROWS, LENGTH)["peak"]
    theirs = peer(options.peers, "step", DATA, base(), "--steps", "0")["peak"]
    record("memory", [mine / theirs], "<= 0.8", bytes=[mine, theirs])


FIGURES = {
    "mfu": mfu, "mfu_plain": mfu_plain, "mfu_fp32": mfu_fp32, "checkpoint": checkpoint,
    "start": start, "memory": memory,
}  # fmt: skip


def main() -> None:
    """Measure the figures asked for."""
    parser = parser_of("costs", __doc__, FIGURES)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for figure in options.names or FIGURES:
        FIGURES[figure](options)


if __name__ == "__main__":
    main()
