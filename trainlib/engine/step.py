"""One optimizer step, and the sums behind its metrics.

A step minimizes (sum of losses) / (number of targets in the step), so the update does not depend on
the number and size of micro-batches.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainlib.data.loader import StepBatch
from trainlib.engine.training import Metrics, MetricSums, Training


@dataclass
class StepResult:
    """Results of one optimizer step: means over its targets."""

    loss: float
    grad_norm: float
    """Gradient norm before clipping."""
    finite: bool
    metrics: Metrics


def optimizer_step(training: Training, batch: StepBatch, loss_scale: float) -> StepResult:
    """Update the model from the micro-batches on all ranks, unless loss or gradient is not finite.

    The global gradient norm is clipped to optim.grad_clip. The loss is multiplied by loss_scale
    before the backward pass, so that small fp16 gradients do not underflow.
    """
    run, model, optimizers = training.run, training.model, training.optimizers
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss_sum = torch.zeros((), device=run.hardware.device)
    sums: MetricSums = {}
    for micro_batch in batch.micro_batches:
        micro_batch = micro_batch.to(run.hardware.device)
        with run.hardware.autocast():
            loss, metrics = training.loss_fn(model, micro_batch)
        (loss * (loss_scale / batch.num_targets)).backward()
        loss_sum = loss_sum + loss.detach()
        add_metrics(sums, metrics)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    totals = [torch.as_tensor(total, device=loss_sum.device) for total, _ in sums.values()]
    counts = torch.tensor([float(count) for _, count in sums.values()])
    counts = counts.to(run.hardware.device, non_blocking=True)
    figures = torch.cat([torch.stack([loss_sum, *totals]).float(), counts])
    run.distributed.all_reduce([*gradients, figures])
    if loss_scale != 1:
        torch._foreach_mul_(gradients, 1 / loss_scale)  # pyright: ignore
    clip = run.config.optim.grad_clip or math.inf
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    # The only synchronization with the device: transfer all results of the step at once.
    loss_value, *values, norm = torch.cat([figures, norm.float().view(1)]).tolist()
    finite = math.isfinite(loss_value) and math.isfinite(norm)
    if finite:
        for optimizer in optimizers:
            optimizer.step()
    pairs = zip(values[: len(sums)], values[len(sums) :], strict=True)
    metrics = means(dict(zip(sums, pairs, strict=True)))
    return StepResult(loss_value / batch.num_targets, norm, finite, metrics)


def add_metrics(sums: MetricSums, more: MetricSums) -> None:
    """Add (sum, count) pairs by name."""
    for name, (value, count) in more.items():
        value = value.detach() if isinstance(value, Tensor) else value
        before = sums.get(name, (0, 0))
        sums[name] = (before[0] + value, before[1] + count)


def means(sums: MetricSums) -> Metrics:
    """Return sum / count for each metric whose count is not zero."""
    return {name: float(value) / count for name, (value, count) in sums.items() if count}
