"""The training loop that all three stages share."""

from __future__ import annotations

import logging
import math
from contextlib import closing

from tqdm.contrib.logging import logging_redirect_tqdm

from trainlib.core.errors import UserError
from trainlib.engine.best import Best
from trainlib.engine.control import Control
from trainlib.engine.metrics import MetricsLog, NoMetricsLog
from trainlib.engine.progress import Display
from trainlib.engine.step import optimizer_step
from trainlib.engine.train_state import restore, save
from trainlib.engine.training import Training
from trainlib.engine.validation import steps_between_evaluations

log = logging.getLogger(__name__)
MAX_BAD_STEPS = 10


def fit(training: Training) -> bool:
    """Train until the schedule ends or a stop is requested.

    Returns True on the main process if the run finished. Raises UserError after MAX_BAD_STEPS
    consecutive steps without a finite gradient, or if a checkpoint or report cannot be written.
    """
    run, schedule, checkpoints = training.run, training.schedule, training.checkpoints
    config, state = run.config, restore(training)
    is_main, resume_step = run.distributed.is_main, state.step if run.resume_from else None
    metrics: MetricsLog = NoMetricsLog()
    if is_main:
        metrics = MetricsLog(run.folder, resume_step, training.datasets.baselines)
    display, best = Display(training, state, metrics), Best(training, state)

    def run_evaluation() -> None:
        with run.clock.evaluating():
            values, samples = training.evaluate(training)
        state.evaluated = state.step
        best.update(values.get("loss", math.nan))
        display.show_validation({f"val/{name}": v for name, v in values.items()}, samples)

    def evaluation_due() -> bool:
        first_or_last = state.step == 0 or schedule.reached(state.step)
        return first_or_last or due(state.step, steps_between_evaluations(training))

    control = Control(run.folder, run.clock, run.distributed)
    with logging_redirect_tqdm(), control, closing(display):
        if state.evaluated != state.step and evaluation_due():
            run_evaluation()
        stopping = False
        while not schedule.reached(state.step) and not stopping:
            lr = schedule.set_rates(training.optimizers, state.step)
            batch = display.wait_for(training.loader)
            # ------------------------------------------------------------------------------------
            result = optimizer_step(training, batch, state.loss_scale)
            # ------------------------------------------------------------------------------------
            state.advance(batch, result.finite)
            display.count(batch, result, lr)
            if state.bad_steps == MAX_BAD_STEPS:
                raise UserError(
                    f"step {state.step}: loss or gradient was not finite {MAX_BAD_STEPS} times in "
                    "a row. Lower optim.*_lr, or check the data. The last checkpoint is intact."
                )
            requests = control.poll(state.step, schedule)
            if requests.finish is not None:
                schedule.begin_decay(state.step, requests.finish)
                display.show_decay()
            end = schedule.reached(state.step)
            stopping = requests.stop and not end  # A stop request in the last step is ignored.
            timed = requests.evaluate and config.eval_every_steps == "auto"
            if not stopping and (timed or evaluation_due()):
                run_evaluation()
            if requests.save or stopping or end or due(state.step, config.save_every_steps):
                save(training, state)
        # Join before the signal handlers are restored: a signal must not interrupt the write.
        checkpoints.join()
        finished = schedule.reached(state.step)
        if finished:
            display.close()
            if is_main:
                kept, lines = best.load()
                display.show(lines)
                try:
                    files = training.finish(training, kept)
                except OSError as error:
                    raise UserError(
                        f"{run.folder}: the report could not be written ({error}). The last "
                        "checkpoint is intact. Free some space, then rerun the command to resume."
                    ) from error
                checkpoints.save("final", training.model, files)
                checkpoints.join()
    display.summary(finished)
    metrics.close()
    return finished and is_main


def due(step: int, every: int) -> bool:
    """Return whether a step is a multiple of `every`; if `every` is 0, return False."""
    return bool(every) and step % every == 0
