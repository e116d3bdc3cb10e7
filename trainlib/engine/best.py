"""The weights with the smallest validation loss in best/, and which weights final/ gets."""

import json
import logging
import math
import shutil
import zlib
from typing import Any

from trainlib.core.files import changed_files
from trainlib.engine.checkpoint import RESUMED
from trainlib.engine.metrics import VAL_LOSS, read_metrics
from trainlib.engine.train_state import TrainState
from trainlib.engine.training import Training
from trainlib.engine.validation import difference_error

log = logging.getLogger(__name__)

RECORD = "validation.json"  # Step, loss, validation set, and the losses of its batches.


class Best:
    """The best evaluation of a run after step 0, whose weights are in best/ (keep_best).

    Step 0 does not count: the model before training is in init_from already. Only the main process
    has a record, and best/ is its only copy, so that it matches the weights in every crash.
    """

    def __init__(self, training: Training, state: TrainState) -> None:
        self.training, self.state = training, state
        self.folder = training.run.folder / "best"
        self.keeps = training.run.config.keep_best and training.run.distributed.is_main
        self.reread()

    def reread(self) -> None:
        """Take the record from best/; if it does not belong to this run, remove best/."""
        self.record: dict[str, Any] | None = None
        if not self.keeps or not self.folder.exists():
            return
        try:
            record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
            if changed := RESUMED & changed_files(self.folder):
                raise ValueError(f"{', '.join(changed)} changed since it was written")
            # With the same recipe and data, as resume=auto requires, a record from after the
            # checkpoint is also from this run.
            later = record["step"] > self.state.step
            if record["validation"] != validation_key(self.training):
                problem = "the validation set has changed"
            elif later and self.training.run.chose_checkpoint():
                problem = f"step {record['step']} comes after the checkpoint"
            else:
                self.record = record
                return
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"it is damaged: {error}"
        log.info("%s starts again: %s", self.folder, problem)
        shutil.rmtree(self.folder, ignore_errors=True)

    def update(self, loss: float) -> None:
        """Record the loss of an evaluation, and write best/ if it is the smallest."""
        state, batches = self.state, self.training.val_batches
        state.val_error = 0.0
        if self.record is not None and not loss < self.record["loss"]:
            state.val_error = difference_error(self.record["batches"], batches)
        elif self.keeps and state.step and math.isfinite(loss):
            key = validation_key(self.training)
            self.record = {"step": state.step, "loss": loss, "validation": key}
            self.record["batches"] = batches.copy()
            files = {RECORD: json.dumps(self.record).encode()}
            self.training.checkpoints.save("best", self.training.model, files)

    def load(self) -> tuple[int, list[str]]:
        """Load the weights for final/ into the model; return their step, and lines for the log."""
        training, last = self.training, self.state.step
        rows = read_metrics(training.run.folder)
        losses = {int(row["step"]): row[VAL_LOSS] for row in rows if VAL_LOSS in row}
        loss, untrained = losses.get(last, math.nan), losses.pop(0, math.inf)
        if self.record is not None:
            losses = {self.record["step"]: self.record["loss"]}
        if not losses:
            return last, []
        best = min(losses, key=lambda step: losses[step])
        warning = (
            f"warning: training did not improve validation (loss {untrained:.4f} at step 0). "
            "Lower optim.*_lr, or check that the validation files resemble the training data."
        )
        kept, which = last, "the last weights"
        if self.record is not None and not loss <= losses[best] + self.state.val_error:
            fix = "Remove it and rerun the command to use the last weights."
            training.checkpoints.load_weights(training.model, self.folder, fix)
            kept, which = best, "these weights, not the last ones"
        text = f"validation was best at step {best} (loss {losses[best]:.4f}); final/ has {which} "
        text += f"(loss {loss:.4f} at step {last}"
        if self.state.val_error > 0:
            text += f", standard error of the difference {self.state.val_error:.4f}"
        return kept, [*[warning] * (untrained <= losses[best]), text + ")"]


def validation_key(training: Training) -> str:
    """Return a text that changes with the validation rows."""
    texts = [training.datasets.data_key]
    for name, val in training.datasets.val.items():
        texts.append(f"{name} {val.row_length} {val.max_rows} {zlib.crc32(val.selection)}")
    return " ".join(texts)
