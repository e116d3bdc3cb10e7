"""One optimizer step, and the sums that its metrics are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainlib.data.loader import StepBatch
from trainlib.engine.device import LossFunction
from trainlib.engine.run import Run

Metrics = dict[str, float]


@dataclass
class StepResult:
    """What one optimizer step measured: means over its targets."""

    loss: float
    grad_norm: float
    finite: bool
    metrics: Metrics


def optimizer_step(
    run: Run,
    model: nn.Module,
    optimizers: list[Optimizer],
    loss_fn: LossFunction,
    batch: StepBatch,
    loss_scale: float,
) -> StepResult:
    """One update from all micro-batches of all ranks; none if the gradient is not finite.

    The gradient's norm is clipped to optim.grad_clip over all parameters together. The backward
    pass is of loss_scale times the loss, which keeps small fp16 gradients from becoming 0.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss_sum = torch.zeros((), device=run.hardware.device)
    sums: dict[str, tuple[Any, Any]] = {}
    for micro_batch in batch.micro_batches:
        micro_batch = micro_batch.to(run.hardware.device)
        with run.hardware.autocast():
            loss, metrics = loss_fn(model, micro_batch)
        (loss * (loss_scale / batch.num_targets)).backward()
        loss_sum = loss_sum + loss.detach()
        add_metrics(sums, metrics)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    totals = [torch.as_tensor(total, device=loss_sum.device) for total, _ in sums.values()]
    counts = torch.tensor([float(count) for _, count in sums.values()])
    counts = counts.to(run.hardware.device, non_blocking=True)
    figures = torch.cat([torch.stack([loss_sum, *totals]).float(), counts])
    run.ranks.sum([*gradients, figures])
    if loss_scale != 1:
        torch._foreach_mul_(gradients, 1 / loss_scale)  # pyright: ignore
    clip = run.config.optim.grad_clip or math.inf
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    # The one synchronisation with the device: all figures of the step at once.
    loss_value, *values, norm = torch.cat([figures, norm.float().view(1)]).tolist()
    finite = math.isfinite(loss_value) and math.isfinite(norm)
    if finite:
        for optimizer in optimizers:
            optimizer.step()
    pairs = zip(values[: len(sums)], values[len(sums) :], strict=True)
    metrics = means(dict(zip(sums, pairs, strict=True)))
    return StepResult(loss_value / batch.num_targets, norm, finite, metrics)


def add_metrics(sums: dict[str, tuple[Any, Any]], more: dict[str, tuple[Any, Any]]) -> None:
    """Add (sum, count) pairs by name."""
    for name, (value, count) in more.items():
        value = value.detach() if isinstance(value, Tensor) else value
        before = sums.get(name, (0, 0))
        sums[name] = (before[0] + value, before[1] + count)


def means(sums: dict[str, tuple[Any, Any]]) -> Metrics:
    """Sum over count of each metric that counted anything."""
    return {name: float(value) / count for name, (value, count) in sums.items() if count}
