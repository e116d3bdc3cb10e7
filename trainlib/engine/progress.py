"""Progress display of a run: bar, log lines and summary."""

import logging
import math
import time

from tqdm import tqdm

from trainlib.data.epoch_plan import DataPosition
from trainlib.data.loader import StepBatch, StepLoader
from trainlib.engine import metrics as names
from trainlib.engine.flops import matmul_peak
from trainlib.engine.metrics import MetricsLog, newly_passed, one_line
from trainlib.engine.step import StepResult
from trainlib.engine.train_state import TrainState
from trainlib.engine.training import Metrics, Training

log = logging.getLogger(__name__)

WIDTH, LONGEST = 100, 40  # Columns of a table of metrics, and of its longest name.
SKILLS = "val/skills/"


class Display:
    """Progress bar, log lines with the speed, and the final summary of a run."""

    def __init__(self, training: Training, state: TrainState, metrics: MetricsLog) -> None:
        run = training.run
        self.run, self.schedule, self.state = run, training.schedule, state
        self.metrics, self.datasets = metrics, training.datasets
        peak = matmul_peak(run.hardware.device, run.hardware.precision)
        self.mfu_per_speed = training.flops_per_token / (peak * run.distributed.world_size)
        disable = None if run.distributed.is_main else True
        self.bar = tqdm(total=self.schedule.num_steps, initial=state.step, unit="step",
                        desc=run.stage, disable=disable)  # fmt: skip
        self.close = self.bar.close
        self._reset()

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
        values = {names.TRAIN_LOSS: result.loss, names.TRAIN_LR: lr,
                  names.TRAIN_GRAD_NORM: result.grad_norm, names.TRAIN_SPEED: speed,
                  names.TRAIN_MFU: mfu, names.TRAIN_DATA_WAIT: waited,
                  names.TRAIN_TOKENS: self.state.tokens,
                  **{f"train/{name}": value for name, value in result.metrics.items()}}  # fmt: skip
        left = self.run.clock.left()
        if left is None and self.schedule.num_steps is not None:
            left = (self.schedule.num_steps - step) * seconds / self.steps
        text = (f"step {step} loss {result.loss:.4f} lr {lr:.2e} grad_norm {result.grad_norm:.2f} "
                f"tokens/s {speed:,.0f} mfu {mfu:.1%} wait {waited:.1%} left "
                f"{max(0, left or 0) / 60:.1f} min")  # fmt: skip
        text += "" if result.finite else "  NOT FINITE, skipped"
        self.metrics.write_step(step, values, text)
        self.bar.set_postfix_str(
            f"loss {result.loss:.3f}, {speed:,.0f} tokens/s, wait {waited:.0%}"
        )
        if self.bar.disable:
            log.info("%s", text)
        self._reset()

    def show_validation(self, metrics: Metrics, samples: list[str]) -> None:
        """Print and record an evaluation. Its time does not count as training time."""
        step, baselines = self.state.step, self.datasets.baselines
        value = metrics.get(names.VAL_BITS_PER_BYTE, math.inf)
        passed = newly_passed(value, baselines, self.state.passed)
        self.state.passed += passed
        num_pairs = {}
        if names.VAL_REWARD_ACCURACY in metrics:
            read = {f"val/{n}": val.rows(DataPosition()) for n, val in self.datasets.val.items()}
            num_pairs = {name: sum(len(row) for row, _ in rows) for name, rows in read.items()}
            num_pairs["val"] = sum(num_pairs.values())
        lines = validation_tables(step, metrics, num_pairs)
        for name in passed:
            compared = f"{value:.3f} against {baselines[name]:.3f} bits per byte"
            lines.append(f"below the {name} baseline at step {step}: {compared}")
        self.metrics.write_evaluation(step, metrics, samples, lines)
        for line in (*(f"sample: {one_line(text)}" for text in samples), *lines):
            log.info("%s", line)
        self._reset()

    def show(self, lines: list[str]) -> None:
        """Log lines in the terminal and in train.log."""
        for line in lines:
            log.info("%s", line)
        self.metrics.write_lines(lines)

    def show_decay(self) -> None:
        """Log the first and the last step of the learning rate decay."""
        begin, _, end = self.schedule.decay or (0, 0, 0)
        self.bar.total = end
        log.info("the learning rate decays from step %d; the run ends at step %d", begin, end)

    def summary(self, finished: bool) -> None:
        """Log whether the run finished or was stopped."""
        step, folder = self.state.step, self.run.folder
        if finished:
            share = 100 * self.run.clock.evaluation_share()
            log.info("finished %d steps, %s tokens (%.0f %% of the time in evaluations): %s",
                     step, f"{self.state.tokens:,}", share, folder / "final")  # fmt: skip
        else:
            log.info("stopped after step %d; run the same command to resume from %s/step_%06d",
                     step, folder, step)  # fmt: skip


def validation_tables(step: int, metrics: Metrics,
                      num_pairs: dict[str, int] | None = None) -> list[str]:  # fmt: skip
    """Return the metrics of an evaluation as tables, with a row for each validation set and "all".

    Skills have a table of their own. `num_pairs` adds the number of pairs to some rows.
    """
    sets: dict[str, dict[str, str]] = {}
    skills: dict[str, dict[str, str]] = {}
    for name, value in metrics.items():
        path, _, metric = name.rpartition("/")
        if metric == "exact_match" and path.startswith(SKILLS):
            kind, _, wording = path.removeprefix(SKILLS).partition("/")
            skills.setdefault(kind, {})[wording or "trained"] = f"{value:.3f}"
        else:
            metric = metric.replace("log_probs", "logp").removeprefix("reward_")
            sets.setdefault(path, {})[metric] = f"{value:.4f}"
    for path, count in (num_pairs or {}).items():
        sets.setdefault(path, {})["pairs"] = str(count)
    total = sets.pop("val", {})
    rows = {path.removeprefix("val/"): row for path, row in sets.items()} if len(sets) > 1 else {}
    lines = table(f"validation at step {step}", {**rows, "all": total})
    return lines + (table(f"skills at step {step}", skills) if skills else [])


def table(title: str, rows: dict[str, dict[str, str]]) -> list[str]:
    """Return a header and a line for each row by its name, in blocks of at most WIDTH columns."""
    header = {column: column[:LONGEST] for row in rows.values() for column in row}
    first = max(len(name[:LONGEST]) for name in (title, *rows))
    blocks: list[list[str]] = []
    used = WIDTH
    for column in header:
        width = 2 + max(len(row.get(column, "-")) for row in (header, *rows.values()))
        if used + width > WIDTH:
            used = first
            blocks.append([""] * (len(rows) + 1))
        used += width
        cells = (row.get(column, "-") for row in (header, *rows.values()))
        blocks[-1] = [f"{line}{c:>{width}}" for line, c in zip(blocks[-1], cells, strict=True)]
    names = [f"{name[:LONGEST]:<{first}}" for name in (title, *rows)]
    return [name + line for block in blocks for name, line in zip(names, block, strict=True)]
