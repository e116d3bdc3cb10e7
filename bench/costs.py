"""Benchmarks of utilization, checkpoint overhead, startup time and memory.

    python -m bench.costs [NAME ...] [--peers .venv-peers] [--repeats 3]

    mfu          model FLOP utilization of the first step with default settings (131,072 tokens),
                 relative to the fastest matmul in that precision in the same run; includes loading
                 data and the first use of kernels, but not compilation
    mfu_plain    the same, uncompiled
    mfu_fp32     the same in fp32, uncompiled
    checkpoint   overhead of saving every 200 steps, as a share of training time
    start        seconds from the command to the first step, with cached data and no compilation;
                 includes the evaluation of one row and three samples before that step
    memory       peak memory of a step on 8 rows of 512 tokens, ours / transformers, AdamW, fp32

    busy         speed of the tiny model next to two busy processes per core, relative to that on
                 idle cores times the fair share of the cores (one third)

All benchmarks but `busy` use the default model, which has 26.9M parameters.
"""

from __future__ import annotations

import trainlib.core.threads  # noqa: F401  # Before torch.

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from bench.common import (
    SAMPLE,
    WORK_DIR,
    base_model,
    cache_environment,
    make_parser,
    record,
    run,
    run_peer,
    seconds_to_first_metrics,
)
from bench.step import own_step
from bench.training import LENGTH, LONG_RUN, ROWS
from tools.past_runs import minutes_trained
from trainlib.core.terminal import use_replacement_characters
from trainlib.engine.metrics import TRAIN_MFU, TRAIN_SPEED

DATA = SAMPLE / "pretrain.jsonl"
STEP = [f"tokens_per_step={ROWS * LENGTH}"]


def mfu(options: argparse.Namespace, name: str = "mfu", more: Sequence[str] = LONG_RUN) -> None:
    """Measure the MFU of the first step in each run."""
    found = []
    for _ in range(options.repeats):
        rows = run("train.py", DATA, "mfu", ["max_steps=1", *more])
        found += [row[TRAIN_MFU] for row in rows if TRAIN_MFU in row]
    record(name, found, ">= 0.65")


def mfu_plain(options: argparse.Namespace) -> None:
    """Measure `mfu` uncompiled; equal to `mfu` on CPUs where long runs are not compiled."""
    mfu(options, "mfu_plain", ["compile=off"])


def mfu_fp32(options: argparse.Namespace) -> None:
    """Measure `mfu_plain` in fp32; equal to `mfu_plain` on CPUs where runs use fp32 anyway."""
    mfu(options, "mfu_fp32", ["compile=off", "precision=fp32"])


def checkpoint(options: argparse.Namespace) -> None:
    """Measure the seconds that one save adds to a run, relative to the time of 200 steps."""

    def timed_run(every: int) -> tuple[float, float]:
        words = [*STEP, "max_steps=10", f"save_every_steps={every}"]
        begin = time.perf_counter()
        rows = run("train.py", DATA, "saving", words)
        return time.perf_counter() - begin, 6 * minutes_trained(rows)[-1]

    found = []
    for _ in range(options.repeats):
        (with_saves, _), (without_saves, step_seconds) = timed_run(1), timed_run(0)
        # Both runs save the last step.
        found.append((with_saves - without_saves) / 9 / (200 * step_seconds))
    record("checkpoint", found, "< 0.01")


def start(options: argparse.Namespace) -> None:
    """Measure the time from the command to the metrics of the evaluation before the first step."""
    found = []
    for _ in range(options.repeats + 1):
        words = ["configs/pretrain.yaml", f"data.files={DATA}", "compile=off",
                 "data.val_max_rows=1", "max_steps=1", *STEP]  # fmt: skip
        found.append(seconds_to_first_metrics(words, WORK_DIR / "start", cache_environment()))
    record("start", found[1:], "< 5 s")  # The first run tokenizes the data.


def memory(options: argparse.Namespace) -> None:
    """Measure the peak memory of a step with train.py's loss and a label at every position."""
    mine = own_step(base_model(), ROWS, LENGTH)["peak"]
    theirs = run_peer(options.peers, "step", DATA, base_model(), "--steps", "0")["peak"]
    record("memory", [mine / theirs], "<= 0.8", bytes=[mine, theirs])


def busy(options: argparse.Namespace) -> None:
    """Measure the speed next to other programs: on idle cores, then next to busy processes."""
    cores = len(os.sched_getaffinity(0))

    def speed() -> float:
        rows = run("train.py", DATA, "busy", ["max_steps=12"], "configs/tiny_pretrain.yaml")
        return statistics.median(row[TRAIN_SPEED] for row in rows if TRAIN_SPEED in row)

    found = []
    for _ in range(max(5, options.repeats)):
        idle = speed()
        others = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * cores)
        ]
        try:
            found.append(speed() / (idle * cores / (cores + len(others))))
        finally:
            for process in others:
                process.kill()
                process.wait()
    record("busy", found, ">= 0.4")


BENCHMARKS = {
    "mfu": mfu, "mfu_plain": mfu_plain, "mfu_fp32": mfu_fp32, "checkpoint": checkpoint,
    "start": start, "memory": memory, "busy": busy,
}  # fmt: skip


def main() -> None:
    """Run the selected benchmarks."""
    use_replacement_characters()
    parser = make_parser("costs", __doc__, BENCHMARKS)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for name in options.names or BENCHMARKS:
        BENCHMARKS[name](options)


if __name__ == "__main__":
    main()
