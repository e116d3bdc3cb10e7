"""What a training step takes: memory by the record of torch's own profiler, time by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile


def allocated_peak(
    parameters: Iterable[torch.Tensor], optimizers: list[Optimizer], step: Callable[[], object]
) -> int:
    """Most bytes that torch's CPU allocator held in a step, weights and moments included.

    The step is taken twice: the first one makes the moments.
    """
    parameters = list(parameters)
    step()
    for optimizer in optimizers:
        optimizer.zero_grad()  # What is freed under the profiler must be allocated under it.
    moments = [v for o in optimizers for s in o.state.values() for v in s.values()]
    held = [t for t in (*parameters, *moments) if isinstance(t, torch.Tensor)]
    before = sum(t.numel() * t.element_size() for t in held)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return before + peak


def measured(
    step: Callable[[], object], model: nn.Module, optimizer: Optimizer, tokens: int, count: int
) -> dict[str, float]:
    """{"peak" in bytes, "per_second" in tokens: the median of `count` steps, left out of none}."""
    found: dict[str, float] = {"peak": allocated_peak(model.parameters(), [optimizer], step)}
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    if seconds:
        found["per_second"] = tokens / statistics.median(seconds)
    return found
