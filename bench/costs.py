"""What training costs beside the steps themselves: utilisation, checkpoints, start, memory.

    python -m bench.costs [FIGURE ...] [--peers .venv-peers] [--repeats 3]

    mfu          share of the best matrix product of that precision, measured in the same run
    checkpoint   share of training time when every 200th step is saved: what a save adds to the run
    start        seconds from the command to the first step, data cached, no compile; the evaluation
                 of one row and three samples that stand before it are in it
    memory       peak of a step of 8 rows of 512 over transformers' step, both with AdamW in fp32

The model is the default of 26.9M parameters.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from batch import Batch
from bench.allocated import allocated_peak
from bench.common import PEERS, PLACE, ROOT, SAMPLE, base, peer, record, run
from hf_folder import load_model
from losses import cross_entropy_sum
from trainlib.metrics import TRAIN_MFU, minutes_trained

DATA = SAMPLE / "pretrain.jsonl"
ROWS, LENGTH, WARM = 8, 512, 2
STEP = [f"tokens_per_step={ROWS * LENGTH}"]


def mfu(options: argparse.Namespace) -> None:
    """Median over the steps after the first two, of each run."""
    found = []
    for _ in range(options.repeats):
        rows = [
            row for row in run("train.py", DATA, "mfu", [*STEP, "max_steps=8"]) if TRAIN_MFU in row
        ]
        found.append(sorted(row[TRAIN_MFU] for row in rows[WARM:])[(len(rows) - WARM) // 2])
    record("mfu", found, ">= 0.65")


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
        folder = PLACE / "start"
        shutil.rmtree(folder, ignore_errors=True)
        words = ["configs/pretrain.yaml", f"out_dir={folder}", f"data.files={DATA}", "device=cpu",
                 "compile=off", "data.val_max_rows=1", "max_steps=1", *STEP]  # fmt: skip
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "train.py", *words],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        metrics = folder / "metrics.jsonl"
        while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.01)
        found.append(time.perf_counter() - begin)
        if process.wait():
            sys.exit(f"train.py {' '.join(words)} failed")
    record("start", found[1:], "< 5 s")  # The first one tokenizes.


def memory(options: argparse.Namespace) -> None:
    """Ours through the loss of train.py, every position a label."""
    model = load_model(base())
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(100, 6000, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(ROWS).repeat_interleave(LENGTH).view(ROWS, LENGTH)
    edges = torch.arange(ROWS + 1, dtype=torch.int32) * LENGTH
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.arange(LENGTH).repeat(ROWS, 1), rows, edges,
                  torch.arange(ROWS), ROWS * LENGTH, 1, ROWS * LENGTH)  # fmt: skip

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy_sum(model(**batch.inputs), batch.selected(batch.labels)).backward()
        optimizer.step()

    mine = allocated_peak(model.parameters(), [optimizer], step)
    theirs = peer(options.peers, "memory", DATA, base())["peak"]
    record("memory", [mine / theirs], "<= 0.8", bytes=[mine, theirs])


FIGURES = {"mfu": mfu, "checkpoint": checkpoint, "start": start, "memory": memory}


def main() -> None:
    """Measure the figures asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.costs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"of {', '.join(FIGURES)}")
    parser.add_argument("--peers", type=Path, default=PEERS)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for figure in options.figures or FIGURES:
        FIGURES[figure](options)


if __name__ == "__main__":
    main()
