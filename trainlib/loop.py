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
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from trainlib.batches import Place, StepBatch, StepLoader
from trainlib.checkpoint import load_optimizer_tensors, optimizer_tensors
from trainlib.control import Control
from trainlib.errors import UserError
from trainlib.launch import Run
from trainlib.metrics import MetricsLog
from trainlib.optim import Schedule
from trainlib.runtime import LossFunction, looking

log = logging.getLogger(__name__)
Metrics = dict[str, float]
MAX_BAD_STEPS = 10


@dataclass
class TrainState:
    """All that the result depends on, beside the weights and the optimizers."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Real positions trained on, padding not counted."""
    position: Place = field(default_factory=Place)
    """The next row of the data."""
    bad_steps: int = 0
    """Steps on end whose gradient was not finite, and which changed nothing."""
    evaluated: int = -1
    """The step of the last evaluation."""


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
    evaluate: Callable[[], Metrics],
) -> bool:
    """Train until the schedule is reached or somebody asks to stop; True when reached.

    Raises UserError after MAX_BAD_STEPS steps on end without a finite gradient.
    """
    state = restore(run, model, optimizers, loader)
    display = Display(run, schedule, state)

    def look() -> None:
        metrics = {f"val/{name}": value for name, value in evaluate().items()}
        state.evaluated = state.step
        run.metrics.write(state.step, metrics)
        display.show_validation(metrics)

    with Control() as control, display:
        if state.evaluated != state.step and due(state.step, run.config.eval_every_steps, schedule):
            look()
        stopping = False
        while not schedule.reached(state.step) and not stopping:
            lr = schedule.set_rates(optimizers, state.step)
            batch = display.wait_for(loader)
            # ------------------------------------------------------------------------------------
            result = optimizer_step(run, model, optimizers, loss_fn, batch)
            # ------------------------------------------------------------------------------------
            state.step += 1
            state.tokens += batch.num_tokens
            state.position = batch.after
            state.bad_steps = 0 if result.finite else state.bad_steps + 1
            display.count(batch, result, lr)
            if state.bad_steps == MAX_BAD_STEPS:
                raise UserError(
                    f"step {state.step}: loss or gradient was not finite in {MAX_BAD_STEPS} steps "
                    f"on end. Lower optim.*_lr, or look at the data. The last checkpoint is kept."
                )
            requests = control.poll(state.step)
            stopping = requests.stop
            end = schedule.reached(state.step)
            if not stopping and due(state.step, run.config.eval_every_steps, schedule):
                look()
            if requests.save or stopping or run.checkpoints.due(
                state.step, run.config.save_every_steps
            ) or end:  # fmt: skip
                save(run, model, optimizers, state)
    run.checkpoints.join()
    finished = schedule.reached(state.step)
    if finished:
        run.checkpoints.write_final(model)
    display.summary(finished)
    run.metrics.close()
    return finished


def optimizer_step(
    run: Run,
    model: nn.Module,
    optimizers: list[Optimizer],
    loss_fn: LossFunction,
    batch: StepBatch,
) -> StepResult:
    """One update from all micro-batches of a step; nothing changes if the gradient is not finite.

    The gradient's norm is clipped to optim.grad_clip over all parameters together.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss_sum: Tensor | float = 0.0
    sums: dict[str, tuple[Any, Any]] = {}
    for micro_batch in batch.micro_batches:
        micro_batch = micro_batch.to(run.hardware.device)
        with run.hardware.autocast():
            loss, metrics = loss_fn(model, micro_batch)
        (loss / batch.num_targets).backward()
        loss_sum = loss_sum + loss.detach()
        add_metrics(sums, metrics)
    clip = run.config.optim.grad_clip or math.inf
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    # The one synchronisation with the device: all figures of the step at once.
    values = torch.stack([torch.as_tensor(loss_sum), norm]).tolist()
    finite = all(map(math.isfinite, values))
    if finite:
        for optimizer in optimizers:
            optimizer.step()
    return StepResult(values[0] / batch.num_targets, values[1], finite, means(sums))


def validate(run: Run, model: nn.Module, loss_fn: LossFunction, datasets: dict) -> Metrics:
    """Mean loss and metrics over each validation set, and over all of them together.

    Returns {"loss": ..., "<name>/loss": ...}, likewise for every metric that loss_fn gives.
    Neither the random state nor the model's mode is changed.
    """
    results: Metrics = {}
    total: dict[str, tuple[Any, Any]] = {}
    with looking(model):
        for name, dataset in datasets.items():
            sums: dict[str, tuple[Any, Any]] = {}
            for batch in micro_batches(dataset, run.hardware.micro_batch_size):
                batch = batch.to(run.hardware.device)
                with run.hardware.autocast():
                    loss, metrics = loss_fn(model, batch)
                add_metrics(sums, {"loss": (loss, batch.num_targets), **metrics})
            add_metrics(total, sums)
            results.update({f"{name}/{key}": value for key, value in means(sums).items()})
    return {**means(total), **results}


def micro_batches(dataset: Any, num_rows: int) -> Any:
    """The first epoch of a data set in micro-batches of one shape."""
    rows = [row for row, _ in dataset.rows(Place())]
    for start in range(0, len(rows), num_rows):
        yield dataset.collate(rows[start : start + num_rows], num_rows)


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


def make_schedule(config: Any, loader: StepLoader) -> Schedule:
    """The run's length in steps, from whichever length is given, and its learning rate."""
    if config.max_steps:
        return Schedule(config.optim, config.max_steps)
    if config.max_tokens:
        positions = loader.rows_per_step * loader.dataset.row_length
        return Schedule(config.optim, -(-config.max_tokens // positions))
    return Schedule(config.optim, loader.num_steps())


def save(run: Run, model: nn.Module, optimizers: list[Optimizer], state: TrainState) -> None:
    """Write a step folder from which training goes on bit for bit (on a CPU)."""
    tensors, scalars = optimizer_tensors(optimizers, model)
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        for i, rng in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"rng/cuda{i}"] = rng
    run.checkpoints.save(
        state.step, model, tensors, {"train": asdict(state), "optimizers": scalars}
    )


def restore(
    run: Run, model: nn.Module, optimizers: list[Optimizer], loader: StepLoader
) -> TrainState:
    """Go on from the run's newest step folder, or begin at step 0; opens the run's metrics."""
    if run.resume_from is None:
        run.metrics = MetricsLog(run.folder, None)
        return TrainState()
    given = run.resume_from if (run.resume_from / "train_state.json").is_file() else None
    restored = run.checkpoints.restore(model, folder=given)
    if restored is None:
        run.metrics = MetricsLog(run.folder, None)
        return TrainState()
    tensors, saved = restored
    load_optimizer_tensors(optimizers, model, tensors, saved["optimizers"])
    state = TrainState(**saved["train"])
    state.position = Place(*state.position)
    loader.seek(state.position)
    torch.set_rng_state(tensors["rng/cpu"])
    if torch.cuda.is_available() and "rng/cuda0" in tensors:
        count = torch.cuda.device_count()
        states = [tensors[f"rng/cuda{i}"] for i in range(count) if f"rng/cuda{i}" in tensors]
        torch.cuda.set_rng_state_all(states)
    run.metrics = MetricsLog(run.folder, state.step)
    folder = given or run.folder / f"step_{state.step:06d}"
    log.info("resuming from %s", folder)
    return state


class Display:
    """What a person sees: the bar, the lines of the log, speed, and the summary at the end."""

    def __init__(self, run: Run, schedule: Schedule, state: TrainState) -> None:
        self.run, self.schedule, self.state = run, schedule, state
        self.bar = tqdm(
            total=schedule.num_steps, initial=state.step, unit="step", desc=run.stage, disable=None
        )
        self._reset()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def _reset(self) -> None:
        self.begin, self.tokens, self.waited = time.perf_counter(), 0, 0.0

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
        self.bar.update(1)
        if not (step % self.run.config.log_every_steps == 0 or self.schedule.reached(step)):
            return
        seconds = time.perf_counter() - self.begin
        values = {
            "train/loss": result.loss,
            "train/lr": lr,
            "train/grad_norm": result.grad_norm,
            "train/tokens_per_second": self.tokens / seconds,
            "train/data_wait": self.waited / seconds,
            "train/tokens": self.state.tokens,
            **{f"train/{name}": value for name, value in result.metrics.items()},
        }
        left = (self.schedule.num_steps - step) * seconds / self.run.config.log_every_steps
        text = (
            f"step {step} loss {result.loss:.4f} lr {lr:.2e} grad_norm {result.grad_norm:.2f} "
            f"tokens/s {self.tokens / seconds:,.0f} wait {self.waited / seconds:.1%} "
            f"left {left / 60:.1f} min" + ("" if result.finite else "  NOT FINITE, skipped")
        )
        self.run.metrics.write_step(step, values, text)
        self.bar.set_postfix_str(
            f"loss {result.loss:.3f}, {self.tokens / seconds:,.0f} tokens/s, "
            f"wait {self.waited / seconds:.0%}"
        )
        if self.bar.disable:
            log.info(text)
        self._reset()

    def show_validation(self, metrics: Metrics) -> None:
        """Print one evaluation, and do not count its time as training."""
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        tqdm.write(f"step {self.state.step} {shown}")
        self._reset()

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
