"""The training loop that all three stages share."""

import logging
import math
from contextlib import closing

from tqdm.contrib.logging import logging_redirect_tqdm

from trainlib.core.errors import Stopped, UserError
from trainlib.engine.best import Best
from trainlib.engine.metrics import MetricsLog, NoMetricsLog
from trainlib.engine.progress import Display
from trainlib.engine.step import optimizer_step
from trainlib.engine.train_state import bad_steps_error, check_finite, restore, save
from trainlib.engine.training import Training
from trainlib.engine.validation import steps_between_evaluations

log = logging.getLogger(__name__)
MAX_BAD_STEPS = 10


def fit(training: Training) -> bool:
    """Train until the schedule ends or a stop is requested."""
    run, schedule, checkpoints = training.run, training.schedule, training.checkpoints
    config, state = run.config, restore(training)
    is_main, resume_step = run.distributed.is_main, state.step if run.resume_from else None
    arguments = run.folder, resume_step, training.datasets.baselines, state.evaluated
    metrics = MetricsLog(*arguments) if is_main else NoMetricsLog()
    display, best = Display(training, state, metrics), Best(training, state)

    def run_evaluation() -> bool:
        """Return False if a stop was requested before the end of the evaluation."""
        check_finite(training, state)
        try:
            with run.clock.evaluating():
                values, samples = training.evaluate(training)
        except Stopped:
            log.info("stopping at step %d, in its evaluation", state.step)
            return False
        state.evaluated = state.step
        best.update(values.get("loss", math.nan))
        display.show_validation({f"val/{name}": v for name, v in values.items()}, samples)
        return True

    def evaluation_due() -> bool:
        first_or_last = state.step == 0 or schedule.reached(state.step)
        return first_or_last or due(state.step, steps_between_evaluations(training))

    with logging_redirect_tqdm(), run.control, closing(display):
        due_now = state.evaluated != state.step and evaluation_due()
        stopping, retry, delay = due_now and not run_evaluation(), 0, 1
        while not schedule.reached(state.step) and not stopping:
            lr = schedule.set_rates(training.optimizers, state.step)
            batch = display.wait_for(training.loader)
            # ------------------------------------------------------------------------------------
            result = optimizer_step(training, batch, state.loss_scale)
            # ------------------------------------------------------------------------------------
            state.advance(batch, result.finite)
            display.count(batch, result, lr)
            if state.bad_steps == 1 and not result.finite:
                first_bad = batch
            if state.bad_steps == MAX_BAD_STEPS:
                raise bad_steps_error(training, state, first_bad)
            if problem := checkpoints.problem():
                retry, delay = state.step + delay, 2 * delay
                best.reread()
                display.show([f"{problem} Training continues; the next try is at step {retry}."])
            requests = run.control.poll(state.step, schedule)
            if requests.finish is not None:
                schedule.begin_decay(state.step, requests.finish)
                display.show_decay()
            end = schedule.reached(state.step)
            stopping = requests.stop and not end  # A stop request in the last step is ignored.
            timed = requests.evaluate and config.eval_every_steps == "auto"
            saves = stopping or end or requests.save or due(state.step, config.save_every_steps)
            # Before the evaluation, which can take long; a run killed in it evaluates again.
            if saves or state.step == retry:
                save(training, state)
            if not stopping and (timed or evaluation_due()) and not run_evaluation():
                stopping = True
                if not saves:
                    save(training, state)
        # Join before the signal handlers are restored: a signal must not interrupt the write.
        checkpoints.join()
        finished = schedule.reached(state.step) and not stopping
        if finished:
            display.close()
            if is_main:
                _write_final(training, best, display)
    display.summary(finished)
    metrics.close()
    return finished and is_main


def _write_final(training: Training, best: Best, display: Display) -> None:
    kept, lines = best.load()
    display.show(lines)
    try:
        files = training.finish(training, kept)
    except OSError as error:
        text = "The last checkpoint is intact. Free some space, then rerun the command to resume."
        where = f"{training.run.folder}: the report could not be written ({error})."
        raise UserError(f"{where} {text}") from error
    training.checkpoints.save("final", training.model, files)
    training.checkpoints.join()


def due(step: int, every: int) -> bool:
    """Return whether a step is a multiple of `every`; if `every` is 0, return False."""
    return bool(every) and step % every == 0
