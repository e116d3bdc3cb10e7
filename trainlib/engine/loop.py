"""The training loop of all three stages, and the one optimizer step.

A stage hands over `loss_fn(model, batch) -> (loss_sum, {name: (sum, count)})` and `evaluate()`.
The gradient of a step is that of (sum of losses) / (targets of the whole step): micro-batches of
any size and number give the same update.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from trainlib import metrics as names
from trainlib.control import Control
from trainlib.core.distributed import Ranks
from trainlib.core.errors import UserError
from trainlib.data.loader import ALONE, Place, StepBatch, StepLoader
from trainlib.launch import Run
from trainlib.metrics import newly_passed
from trainlib.mfu import matmul_peak
from trainlib.optim import Schedule
from trainlib.runtime import Hardware, LossFunction, looking
from trainlib.state import TrainState, restore, save

log = logging.getLogger(__name__)
Metrics = dict[str, float]
MAX_BAD_STEPS = 10


@dataclass
class StepResult:
    """What one optimizer step measured: means over its targets."""

    loss: float
    grad_norm: float
    finite: bool
    metrics: Metrics


def fit(
    run: Run,
    model: nn.Module,
    optimizers: list[Optimizer],
    schedule: Schedule,
    loss_fn: LossFunction,
    loader: StepLoader,
    evaluate: Callable[[], tuple[Metrics, list[str]]],
    finish: Callable[[], None],
) -> bool:
    """Train until the schedule is reached or somebody asks to stop.

    `evaluate` gives the figures of validation and texts that the model wrote; `finish` writes what
    the trained model is reported by, in the first rank, before final/ says that all is there.
    Returns whether it was reached, to the one process that may say so and go on from there.
    Raises UserError after MAX_BAD_STEPS steps on end without a finite gradient, and where the end
    cannot be written.
    """
    state = restore(run, model, optimizers, schedule, loader)
    display = Display(run, schedule, state)

    def look() -> None:
        metrics, samples = evaluate()
        state.evaluated = state.step
        display.show_validation({f"val/{name}": v for name, v in metrics.items()}, samples)

    with Control(run.folder, run.clock, run.ranks) as control, display:
        if state.evaluated != state.step and due(state.step, run.config.eval_every_steps, schedule):
            look()
        stopping = False
        while not schedule.reached(state.step) and not stopping:
            lr = schedule.set_rates(optimizers, state.step)
            batch = display.wait_for(loader)
            # ------------------------------------------------------------------------------------
            result = optimizer_step(run, model, optimizers, loss_fn, batch, state.loss_scale)
            # ------------------------------------------------------------------------------------
            state.advance(batch, result.finite)
            display.count(batch, result, lr)
            if state.bad_steps == MAX_BAD_STEPS:
                raise UserError(
                    f"step {state.step}: loss or gradient was not finite in {MAX_BAD_STEPS} steps "
                    f"on end. Lower optim.*_lr, or look at the data. The last checkpoint is kept."
                )
            requests = control.poll(state.step, schedule)
            if requests.finish is not None:
                schedule.begin_decay(state.step, requests.finish)
                display.show_decay()
            end = schedule.reached(state.step)
            stopping = requests.stop and not end  # Asked in its last step, a run ends as planned.
            if not stopping and due(state.step, run.config.eval_every_steps, schedule):
                look()
            if requests.save or stopping or run.checkpoints.due(
                state.step, run.config.save_every_steps
            ) or end:  # fmt: skip
                save(run, model, optimizers, schedule, state)
        # Before the signals get their old meaning back: a second one must not end the writing.
        run.checkpoints.join()
        finished = schedule.reached(state.step)
        if finished:
            display.close()
            if run.ranks.first:
                try:
                    finish()
                except OSError as error:
                    raise UserError(
                        f"{run.folder}: the report could not be written ({error}). The last step "
                        "folder is whole; free some space and start again to go on from it."
                    ) from error
            run.checkpoints.write_final(model)
    display.summary(finished)
    run.metrics.close()
    return finished and run.ranks.first


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


def validate(run: Run, model: nn.Module, loss_fn: LossFunction, datasets: dict) -> Metrics:
    """Mean loss and metrics over each validation set, and over all of them together.

    Returns {"loss": ..., "<name>/loss": ...}, likewise for every metric that loss_fn gives. The
    ranks share the work. Neither the random state nor the model's mode is changed.
    """
    shares: dict[str, dict[str, tuple[float, float]]] = {}
    with looking(model):
        for name, dataset in datasets.items():
            sums: dict[str, tuple[Any, Any]] = {}
            for batch in micro_batches(dataset, run.hardware, run.ranks):
                batch = batch.to(run.hardware.device)
                with run.hardware.autocast():
                    loss, metrics = loss_fn(model, batch)
                add_metrics(sums, {"loss": (loss, batch.num_targets), **metrics})
            shares[name] = {key: (float(sum_), float(n)) for key, (sum_, n) in sums.items()}
    results: Metrics = {}
    total: dict[str, tuple[Any, Any]] = {}
    everybody = run.ranks.gather(shares)
    for name in datasets:
        sums = {}
        for theirs in everybody:
            add_metrics(sums, theirs[name])
        add_metrics(total, sums)
        results.update({f"{name}/{key}": value for key, value in means(sums).items()})
    return {**means(total), **results}


def micro_batches(dataset: Any, hardware: Hardware, ranks: Ranks = ALONE) -> Any:
    """The first epoch of a data set in micro-batches; of these, a rank's share.

    For compiled layers all are of one shape, the last one filled up with empty rows.
    """
    rows, size = [row for row, _ in dataset.rows(Place())], hardware.micro_batch_size
    for start in range(ranks.rank * size, len(rows), ranks.count * size):
        some = rows[start : start + size]
        yield dataset.collate(some, size if hardware.compile else len(some))


def add_metrics(sums: dict[str, tuple[Any, Any]], more: dict[str, tuple[Any, Any]]) -> None:
    """Add (sum, count) pairs by name."""
    for name, (value, count) in more.items():
        value = value.detach() if isinstance(value, Tensor) else value
        before = sums.get(name, (0, 0))
        sums[name] = (before[0] + value, before[1] + count)


def means(sums: dict[str, tuple[Any, Any]]) -> Metrics:
    """Sum over count of each metric that counted anything."""
    return {name: float(value) / count for name, (value, count) in sums.items() if count}


def due(step: int, every: int, schedule: Schedule) -> bool:
    """Whether to evaluate after a step: at the start, at the end, and every so many steps."""
    return step == 0 or schedule.reached(step) or bool(every and step % every == 0)


def make_loader(run: Run, dataset: Any) -> StepLoader:
    """This rank's share of the steps over a data set."""
    c, hardware = run.config, run.hardware
    pin = hardware.device.type == "cuda"
    return StepLoader(
        dataset, c.tokens_per_step, hardware.micro_batch_size, c.epochs, run.ranks, pin
    )


def make_schedule(config: Any, loader: StepLoader) -> Schedule:
    """The run's length, from whichever is given, and its learning rate.

    A length in time has no number of steps: such a schedule is open until the time runs out.
    """
    if config.max_hours:
        return Schedule(config.optim, None)
    if config.max_steps:
        return Schedule(config.optim, config.max_steps)
    if config.max_tokens:
        positions = loader.rows_per_step * loader.dataset.row_length
        return Schedule(config.optim, -(-config.max_tokens // positions))
    return Schedule(config.optim, loader.num_steps())


class Display:
    """What a person sees: the bar, the lines of the log, speed, and the summary at the end."""

    def __init__(self, run: Run, schedule: Schedule, state: TrainState) -> None:
        self.run, self.schedule, self.state = run, schedule, state
        self.peak = matmul_peak(run.hardware.device, run.hardware.precision) * run.ranks.count
        run.metrics.add_yardsticks(run.yardsticks)
        self.bar = tqdm(
            total=schedule.num_steps, initial=state.step, unit="step", desc=run.stage,
            disable=None if run.ranks.first else True,
        )  # fmt: skip
        self._reset()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it is: what comes after are lines."""
        self.bar.close()

    def _reset(self) -> None:
        self.begin, self.tokens, self.waited, self.steps = time.perf_counter(), 0, 0.0, 0

    def wait_for(self, loader: StepLoader) -> StepBatch:
        """The next step's data, the time for it counted."""
        begin = time.perf_counter()
        batch = next(loader)
        self.waited += time.perf_counter() - begin
        return batch

    def count(self, batch: StepBatch, result: StepResult, lr: float) -> None:
        """Take note of a step; write a line when one is due."""
        step = self.state.step
        self.tokens += batch.num_tokens
        self.steps += 1
        self.bar.update(1)
        if not (step % self.run.config.log_every_steps == 0 or self.schedule.reached(step)):
            return
        seconds = time.perf_counter() - self.begin
        mfu = self.run.flops_per_token * self.tokens / seconds / self.peak
        values = {
            names.TRAIN_LOSS: result.loss,
            names.TRAIN_LR: lr,
            names.TRAIN_GRAD_NORM: result.grad_norm,
            names.TRAIN_SPEED: self.tokens / seconds,
            names.TRAIN_MFU: mfu,
            names.TRAIN_DATA_WAIT: self.waited / seconds,
            names.TRAIN_TOKENS: self.state.tokens,
            **{f"train/{name}": value for name, value in result.metrics.items()},
        }
        left = self.run.clock.left()
        if left is None and self.schedule.num_steps is not None:
            left = (self.schedule.num_steps - step) * seconds / self.steps
        text = (
            f"step {step} loss {result.loss:.4f} lr {lr:.2e} grad_norm {result.grad_norm:.2f} "
            f"tokens/s {self.tokens / seconds:,.0f} mfu {mfu:.1%} wait {self.waited / seconds:.1%} "
            f"left {max(0, left or 0) / 60:.1f} min"
            + ("" if result.finite else "  NOT FINITE, skipped")
        )
        self.run.metrics.write_step(step, values, text)
        self.bar.set_postfix_str(
            f"loss {result.loss:.3f}, {self.tokens / seconds:,.0f} tokens/s, "
            f"wait {self.waited / seconds:.0%}"
        )
        if self.bar.disable:
            log.info("%s", text)
        self._reset()

    def show_validation(self, metrics: Metrics, samples: list[str]) -> None:
        """Print and record one evaluation, and do not count its time as training."""
        step, yardsticks = self.state.step, self.run.yardsticks
        value = metrics.get(names.VAL_BITS_PER_BYTE, math.inf)
        passed = newly_passed(value, yardsticks, self.state.passed)
        self.state.passed += passed
        words = [
            f"{text} at step {step}: {value:.3f} against {yardsticks[name]:.3f} bits per byte"
            for name, text in passed.items()
        ]
        self.run.metrics.write_evaluation(step, metrics, samples, words)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        told = [f"sample: {text.rstrip()}".replace("\n", " / ") for text in samples]
        if self.run.ranks.first:
            for line in (*told, f"step {step} {shown}", *words):
                tqdm.write(line)
        self._reset()

    def show_decay(self) -> None:
        """Say from when on the rate falls, and to which step."""
        begin, _, end = self.schedule.decay or (0, 0, 0)
        self.bar.total = end
        log.info("the learning rate falls from step %d on; the run ends with step %d", begin, end)

    def summary(self, finished: bool) -> None:
        """Say how it ended."""
        s = self.state
        if finished:
            log.info("finished %d steps, %s tokens: %s", s.step, f"{s.tokens:,}",
                     self.run.folder / "final")  # fmt: skip
        else:
            log.info(
                "stopped after step %d; the same command goes on from %s/step_%06d",
                s.step, self.run.folder, s.step,
            )  # fmt: skip
