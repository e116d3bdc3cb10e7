"""Training state besides weights and optimizers; saved and restored with every checkpoint."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field

import torch

from trainlib.data.epoch_plan import DataPosition
from trainlib.data.loader import StepBatch
from trainlib.engine.checkpoint import load_optimizer_tensors, optimizer_tensors
from trainlib.engine.training import Training

log = logging.getLogger(__name__)
INITIAL_SCALE, SCALE_STEPS = 2.0**16, 2000  # fp16 loss scaling, as in torch's GradScaler.
MIN_SCALE = 2.0  # For fp16; other precisions always use 1.


@dataclass
class TrainState:
    """All state that the result depends on, besides weights and optimizers."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Positions trained on, without padding."""
    position: DataPosition = field(default_factory=DataPosition)
    """The next row of the data to read."""
    bad_steps: int = 0
    """Consecutive steps that were skipped because the gradient was not finite."""
    evaluated: int = -1
    """The step of the last evaluation."""
    val_error: float = 0.0
    """Standard error of the difference between the last validation loss and the smallest one."""
    passed: list[str] = field(default_factory=list)
    """Baselines that an evaluation has already fallen below."""
    seconds: float = 0.0
    """Duration of the run up to its last checkpoint."""
    decay: tuple[int, float, int] | None = None
    """The learning rate decay that was started on request, if any (Schedule.decay)."""
    loss_scale: float = 1.0
    """Factor on the loss before the backward pass; above 1 only with fp16."""
    scaled_steps: int = 0
    """Consecutive steps with a finite gradient at this loss_scale."""
    kernels: list[str] | None = None
    """Kernels used for the steps; None in runs that did not record them."""

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
    state.kernels = list(run.hardware.kernels)
    tensors, scalars = optimizer_tensors(training.optimizers, model)
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        for i, rng in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"rng/cuda{i}"] = rng
    saved = {"train": asdict(state), "optimizers": scalars}
    files = {"train_state.json": json.dumps(saved).encode()}
    training.checkpoints.save(f"step_{state.step:06d}", model, files, tensors)


def restore(training: Training) -> TrainState:
    """Restore the step folder to resume from; without one, return the initial state."""
    run, fp16 = training.run, training.run.hardware.precision == "fp16"
    if run.resume_from is None:
        return TrainState(loss_scale=INITIAL_SCALE if fp16 else 1.0)
    tensors, saved = training.checkpoints.restore(training.model, run.resume_from)
    load_optimizer_tensors(training.optimizers, training.model, tensors, saved["optimizers"])
    state = TrainState(**saved["train"])
    state.position = DataPosition(*state.position)
    training.loader.seek(state.position)
    kernels = list(run.hardware.kernels)
    if state.kernels not in (None, kernels):
        log.warning(
            "resuming with other kernels (%s) than before (%s); was model.py edited?",
            ", ".join(kernels) or "plain", ", ".join(state.kernels or ()) or "plain",
        )  # fmt: skip
    if fp16 != (state.loss_scale > 1):
        # The run started with another precision.
        state.loss_scale = INITIAL_SCALE if fp16 else 1.0
    training.schedule.restore(tuple(state.decay) if state.decay else None)  # type: ignore[arg-type]
    run.clock.earlier = state.seconds
    torch.set_rng_state(tensors["rng/cpu"])
    if torch.cuda.is_available() and "rng/cuda0" in tensors:
        count = torch.cuda.device_count()
        states = [tensors[f"rng/cuda{i}"] for i in range(count) if f"rng/cuda{i}" in tensors]
        torch.cuda.set_rng_state_all(states)
    log.info("resuming from %s", run.resume_from)
    return state
