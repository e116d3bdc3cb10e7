"""The training loop of all three stages, and the one optimizer step.

A stage hands over `loss_fn(model, batch) -> (loss_sum, {name: (sum, count)})` and `evaluate()`.
The gradient of a step is that of (sum of losses) / (targets of the whole step): micro-batches of
any size and number give the same update.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from trainlib.core.errors import UserError
from trainlib.data.loader import StepLoader
from trainlib.engine.control import Control
from trainlib.engine.device import LossFunction
from trainlib.engine.optim import Schedule
from trainlib.engine.progress import Display
from trainlib.engine.run import Run
from trainlib.engine.step import Metrics, optimizer_step
from trainlib.engine.train_state import restore, save

log = logging.getLogger(__name__)
MAX_BAD_STEPS = 10


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
