"""Training state besides weights and optimizers; saved and restored with every checkpoint."""

import json
import logging
import shlex
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from trainlib.core.distributed import run_on_main_process
from trainlib.core.errors import UserError
from trainlib.core.files import changed_files, write_atomically
from trainlib.data.epoch_plan import DataPosition
from trainlib.data.loader import StepBatch
from trainlib.engine import checkpoint
from trainlib.engine.checkpoint import DAMAGED, RESUMED, DamagedError
from trainlib.engine.training import Training
from trainlib.models.hf_folder import not_finite

log = logging.getLogger(__name__)
INITIAL_SCALE, SCALE_STEPS = 2.0**16, 2000  # fp16 loss scaling, as in torch's GradScaler.
MIN_SCALE = 2.0  # For fp16; other precisions always use 1.


@dataclass
class TrainState:
    """All state that the result depends on, besides weights and optimizers."""

    step: int = 0  # Optimizer steps done.
    tokens: int = 0  # Positions trained on, without padding.
    position: DataPosition = field(default_factory=DataPosition)  # The next row of the data.
    bad_steps: int = 0  # Consecutive steps skipped because the gradient was not finite.
    evaluated: int = -1  # The step of the last evaluation.
    val_error: float = 0.0
    """Standard error of the difference between the last validation loss and the smallest one."""
    passed: list[str] = field(default_factory=list)
    """Baselines that an evaluation has already fallen below."""
    seconds: float = 0.0  # Duration of the run up to its last checkpoint.
    decay: tuple[int, float, int] | None = None
    """The learning rate decay that was started on request, if any (Schedule.decay)."""
    loss_scale: float = 1.0  # Factor before the backward pass; above 1 only with fp16.
    scaled_steps: int = 0  # Consecutive steps with a finite gradient at this loss_scale.

    def advance(self, batch: StepBatch, finite: bool) -> None:
        """Count a step, including a skipped one; halve or double the fp16 loss scale if needed."""
        self.step += 1
        self.tokens += batch.num_tokens
        self.position = batch.after
        if self.loss_scale > MIN_SCALE and not finite:
            # An overflow is not a bad step; it is part of finding the largest usable scale.
            self.loss_scale, self.scaled_steps = self.loss_scale / 2, 0
            return
        self.bad_steps = 0 if finite else self.bad_steps + 1
        self.scaled_steps += 1
        if self.loss_scale > 1 and self.scaled_steps >= SCALE_STEPS:
            self.loss_scale, self.scaled_steps = self.loss_scale * 2, 0


def save(training: Training, state: TrainState) -> None:
    """Write a step folder from which training resumes exactly (bit for bit on a CPU)."""
    run, model = training.run, training.model
    state.seconds, state.decay = run.clock.seconds(), training.schedule.decay
    check_finite(training, state)
    tensors, scalars = checkpoint.optimizer_tensors(training.optimizers, model)
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"rng/cuda{i}": rng for i, rng in enumerate(torch.cuda.get_rng_state_all())}
    # Skipped steps did no harm, and a restart must not stop at its first one.
    saved = {"train": {**asdict(state), "bad_steps": 0}, "optimizers": scalars}
    files = {"train_state.json": json.dumps(saved).encode()}
    training.checkpoints.save(f"step_{state.step:06d}", model, files, tensors)


def check_finite(training: Training, state: TrainState) -> None:
    """Raise UserError if a value of the weights or the optimizers is not finite."""
    tensors, _ = checkpoint.optimizer_tensors(training.optimizers, training.model)
    if names := not_finite({**dict(training.model.named_parameters()), **tensors}):
        text = f"{', '.join(names[:3])} has values that are not finite, so nothing is written."
        raise UserError(f"step {state.step}: {text} {advice(training)}")


def bad_steps_error(training: Training, state: TrainState, first: StepBatch) -> UserError:
    """Return the error of several skipped steps, with the files and lines of the first one."""
    ids = {int(i) for micro_batch in first.micro_batches for i in micro_batch.sequence_ids}
    origins = training.datasets.train.origins().items()
    origins = [origin for id_, origin in origins if id_ in ids]
    places = [f"{cache.path}, line {cache.lines[record]}" for cache, record in origins[:5]]
    rows = "; ".join(places) + f"; and {len(origins) - 5} more" * (len(origins) > 5)
    text = f"step {state.step}: loss or gradient was not finite {state.bad_steps} times in a row."
    return UserError(f"{text} The first time, it read {rows}. {advice(training)}")


def advice(training: Training) -> str:
    """Return what to do about values that are not finite: resume at half the learning rate."""
    newest, optim = training.checkpoints.newest(), training.run.config.optim
    matrices = "adamw_lr" if optim.name == "adamw" else "muon_lr"
    keys = [f"resume={newest}"] if newest else []
    keys += [f"optim.{key}={getattr(optim, key) / 2:g}" for key in (matrices, "embedding_lr")]
    start = f"{newest} is the last good checkpoint" if newest else "There is no checkpoint"
    return f"{start}. Try half the learning rate: python {shlex.join([*sys.argv, *keys])}"


def _intact(training: Training, folder: Path) -> Path:
    """Return a step folder, or one before it if it is damaged and the user did not choose it."""
    checkpoints, best = training.checkpoints, training.run.folder / "best"
    older = [] if training.run.chose_checkpoint() else checkpoints.older(folder)
    if older and best.is_dir() and RESUMED & changed_files(best):
        log.warning("%s is damaged; the best weights are searched again from %s", best, older[-1])
        folder, older = older[-1], []
    for before in older:
        try:
            checkpoints.restore(training.model, folder)
            break
        except DamagedError as error:
            log.warning("%s Trying %s.", str(error).removesuffix(DAMAGED), before)
            folder = before
    if folder != training.run.resume_from:  # The next checkpoint follows this one.
        write_atomically(folder.parent / "latest", folder.name)
    return folder


def restore(training: Training) -> TrainState:
    """Restore the step folder to resume from; without one, return the initial state."""
    run, fp16 = training.run, training.run.hardware.precision == "fp16"
    if run.resume_from is None:
        return TrainState(loss_scale=INITIAL_SCALE if fp16 else 1.0)
    newest = run.resume_from
    folder = run_on_main_process(run.distributed, lambda: _intact(training, newest))
    tensors, saved = training.checkpoints.restore(training.model, folder)
    checkpoint.load_optimizer_tensors(
        training.optimizers, training.model, tensors, saved["optimizers"]
    )
    known = {f.name for f in fields(TrainState)}  # Older runs recorded the kernels too.
    state = TrainState(**{k: v for k, v in saved["train"].items() if k in known})
    state.position = DataPosition(*state.position)
    training.loader.seek(state.position)
    if fp16 != (state.loss_scale > 1):  # The run started with another precision.
        state.loss_scale = INITIAL_SCALE if fp16 else 1.0
    training.schedule.restore(tuple(state.decay) if state.decay else None)  # type: ignore[arg-type]
    run.clock.earlier = state.seconds
    torch.set_rng_state(tensors["rng/cpu"])
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = (f"rng/cuda{i}" for i in range(count))
    torch.cuda.set_rng_state_all([tensors[name] for name in names if name in tensors])
    log.info("resuming from %s", folder)
    return state
