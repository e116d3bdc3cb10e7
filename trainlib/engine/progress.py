"""Progress display of a run: bar, log lines and summary."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from types import MappingProxyType

from tqdm import tqdm

from trainlib.data.loader import StepBatch, StepLoader
from trainlib.data.packing import FEW_ROWS
from trainlib.engine import metrics as names
from trainlib.engine.flops import matmul_peak
from trainlib.engine.metrics import MetricsLog, newly_passed
from trainlib.engine.step import StepResult
from trainlib.engine.train_state import TrainState
from trainlib.engine.training import Metrics, Training

log = logging.getLogger(__name__)


class Display:
    """Progress bar, log lines with the speed, and the final summary of a run."""

    def __init__(self, training: Training, state: TrainState, metrics: MetricsLog) -> None:
        run = training.run
        self.run, self.schedule, self.state = run, training.schedule, state
        self.metrics, self.datasets = metrics, training.datasets
        self.baselines = training.datasets.baselines
        peak = matmul_peak(run.hardware.device, run.hardware.precision)
        self.mfu_per_speed = training.flops_per_token / (peak * run.distributed.world_size)
        metrics.add_baselines(self.baselines)
        disable = None if run.distributed.is_main else True
        self.bar = tqdm(total=self.schedule.num_steps, initial=state.step, unit="step",
                        desc=run.stage, disable=disable)  # fmt: skip
        self._reset()

    def close(self) -> None:
        """Close the bar; other lines may follow."""
        self.bar.close()

    def _reset(self) -> None:
        self.begin, self.tokens, self.waited, self.steps = time.perf_counter(), 0, 0.0, 0

    def wait_for(self, loader: StepLoader) -> StepBatch:
        """Return the next step's data, and record the time spent waiting for it."""
        begin = time.perf_counter()
        batch = next(loader)
        self.waited += time.perf_counter() - begin
        return batch

    def count(self, batch: StepBatch, result: StepResult, lr: float) -> None:
        """Count a step, and write a log line if one is due."""
        step = self.state.step
        self.tokens += batch.num_tokens
        self.steps += 1
        self.bar.update(1)
        if not (step % self.run.config.log_every_steps == 0 or self.schedule.reached(step)):
            return
        seconds = time.perf_counter() - self.begin
        speed, waited = self.tokens / seconds, self.waited / seconds
        mfu = speed * self.mfu_per_speed
        values = {
            names.TRAIN_LOSS: result.loss,
            names.TRAIN_LR: lr,
            names.TRAIN_GRAD_NORM: result.grad_norm,
            names.TRAIN_SPEED: speed,
            names.TRAIN_MFU: mfu,
            names.TRAIN_DATA_WAIT: waited,
            names.TRAIN_TOKENS: self.state.tokens,
            **{f"train/{name}": value for name, value in result.metrics.items()},
        }
        left = self.run.clock.left()
        if left is None and self.schedule.num_steps is not None:
            left = (self.schedule.num_steps - step) * seconds / self.steps
        text = (
            f"step {step} loss {result.loss:.4f} lr {lr:.2e} grad_norm {result.grad_norm:.2f} "
            f"tokens/s {speed:,.0f} mfu {mfu:.1%} wait {waited:.1%} "
            f"left {max(0, left or 0) / 60:.1f} min"
            + ("" if result.finite else "  NOT FINITE, skipped")
        )
        self.metrics.write_step(step, values, text)
        self.bar.set_postfix_str(
            f"loss {result.loss:.3f}, {speed:,.0f} tokens/s, wait {waited:.0%}"
        )
        if self.bar.disable:
            log.info("%s", text)
        self._reset()

    def show_validation(self, metrics: Metrics, samples: list[str]) -> None:
        """Print and record an evaluation. Its time does not count as training time."""
        step, baselines = self.state.step, self.baselines
        value = metrics.get(names.VAL_BITS_PER_BYTE, math.inf)
        passed = newly_passed(value, baselines, self.state.passed)
        self.state.passed += passed
        log_lines = [
            f"{text} at step {step}: {value:.3f} against {baselines[name]:.3f} bits per byte"
            for name, text in passed.items()
        ]
        self.metrics.write_evaluation(step, metrics, samples, log_lines)
        num_rows = {}
        if names.VAL_REWARD_ACCURACY in metrics:
            num_rows = {f"val/{name}": val.num_used for name, val in self.datasets.val.items()}
            num_rows["val"] = sum(num_rows.values())
        lines = _validation_lines(step, metrics, num_rows)
        for line in (*map(_sample_line, samples), *lines, *log_lines):
            log.info("%s", line)
        self._reset()

    def show_decay(self) -> None:
        """Log the first and the last step of the learning rate decay."""
        begin, _, end = self.schedule.decay or (0, 0, 0)
        self.bar.total = end
        log.info("the learning rate decays from step %d; the run ends at step %d", begin, end)

    def summary(self, finished: bool) -> None:
        """Log whether the run finished or was stopped."""
        s = self.state
        if finished:
            log.info("finished %d steps, %s tokens: %s", s.step, f"{s.tokens:,}",
                     self.run.folder / "final")  # fmt: skip
        else:
            log.info(
                "stopped after step %d; run the same command to resume from %s/step_%06d",
                s.step, self.run.folder, s.step,
            )  # fmt: skip


def _sample_line(text: str) -> str:
    return f"sample: {text.rstrip()}".replace("\n", "\\n")


def _validation_lines(
    step: int, metrics: Metrics, num_rows: Mapping[str, int] = MappingProxyType({})
) -> list[str]:
    """Return a line for all validation sets together, and one for each set if there are several.

    An accuracy on fewer than FEW_ROWS pairs is followed by their number, from `num_rows`.
    """
    by_set: dict[str, list[str]] = {}
    for name, value in metrics.items():
        set_, _, metric = name.rpartition("/")
        n = num_rows.get(set_, FEW_ROWS)
        note = f" (n {n})" if metric == "reward_accuracy" and n < FEW_ROWS else ""
        by_set.setdefault(set_, []).append(f"{metric} {value:.4f}{note}")
    lines = [f"step {step} {set_} {'  '.join(values)}" for set_, values in by_set.items()]
    return lines if len(lines) > 2 else lines[:1]
