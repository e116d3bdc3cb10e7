"""What a plan learns by taking steps: their memory without any content, their time by the clock."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainlib.batches import Place, StepBatch, StepLoader
from trainlib.memory import peak_bytes
from trainlib.optim import Schedule

MEASURE_SECONDS = 30.0
MEASURED_WITHIN = 1.15
"""A measured prediction is given as a range: the time over and times this."""
Step = Callable[[Any, nn.Module, list[Optimizer], StepBatch], object]
"""One optimizer step of a Run."""


def first_batch(loader: StepLoader, rows: int, num_micro: int) -> StepBatch:
    """A step of so many micro-batches, all the same one of the data's first rows."""
    some = [row for row, _ in itertools.islice(loader.dataset.rows(Place()), rows)]
    targets, tokens = loader.dataset.count(some)
    batch = loader.dataset.collate(some, rows)
    return StepBatch([batch] * num_micro, max(1, num_micro * targets), num_micro * tokens, Place())


def step_peak(
    run: Any, model: nn.Module, loader: StepLoader, step: Step, num_micro: int, rows: int
) -> int:
    """Peak bytes of the run's step on one device; a third micro-batch takes no more than two."""
    run = replace(run, hardware=replace(run.hardware, device=torch.device("cpu")))
    batch = first_batch(loader, rows, min(2, num_micro))
    return peak_bytes(model, run.config.optim, lambda m, o: step(run, m, o, batch))


def measure_step(
    run: Any,
    model: nn.Module,
    optimizers: list[Optimizer],
    schedule: Schedule,
    loader: StepLoader,
    step: Step,
) -> tuple[float, int]:
    """Seconds of a whole step, measured on this machine, and how many steps were taken for it.

    Where a step has many micro-batches, short steps of one and of several are taken in turn, and
    the time of the whole one follows, as each further micro-batch takes as long.
    """
    synchronize = getattr(torch, run.hardware.device.type).synchronize
    schedule.set_rates(optimizers, 0)  # The smallest rate, so that the weights stay sound.

    def seconds(num_micro: int) -> float:
        batch = next(loader)
        share = num_micro / len(batch.micro_batches)
        targets = max(1, round(share * batch.num_targets))
        batch = replace(batch, micro_batches=batch.micro_batches[:num_micro], num_targets=targets)
        synchronize()
        begin = time.perf_counter()
        step(run, model, optimizers, batch)
        synchronize()
        return time.perf_counter() - begin

    whole = len(next(loader).micro_batches)
    seconds(1)  # Makes the moments and picks kernels.
    end = time.perf_counter() + MEASURE_SECONDS
    small = [seconds(1)]
    most = max(1, min(whole, int(0.25 * MEASURE_SECONDS / small[0])))
    large = [seconds(most)]
    while time.perf_counter() < end:
        small.append(seconds(1))
        large.append(seconds(most))
    loader.seek(Place())
    low, high = statistics.median(small), statistics.median(large)
    if most == 1:
        return whole * statistics.median(small + large), len(small + large)
    return high + (whole - most) * max(0.0, high - low) / (most - 1), len(small + large)
