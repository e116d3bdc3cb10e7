"""Check on this machine that a run that was killed ends with the weights of an undisturbed run.

    python -m tools.verify_resume [config.yaml] [section.key=value ...] [--seed N]

Trains twice in a temporary folder: undisturbed, and killed three times (SIGKILL at random moments)
with the same command typed again each time. Then it compares all weights and the state of the
optimizers. The name of the config file says the stage; SFT and DPO need init_from=FOLDER. Without
other settings, a run has 40 steps of 1,024 positions and a checkpoint every 5. The exit code is 0
for PASS, 1 for FAIL or a run that failed, 2 for wrong options.
"""

from __future__ import annotations

import trainlib.core.threads  # noqa: F401  # Before torch.

import argparse
import contextlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tools.compare_runs import first_difference
from trainlib.core.errors import UserError
from trainlib.core.files import ROOT
from trainlib.core.terminal import use_replacement_characters
from trainlib.data.formats import STAGES
from trainlib.engine.metrics import TRAIN_LOSS, read_metrics

DEFAULT = "configs/tiny_pretrain.yaml"
KILLS, STEPS, SAVE_EVERY = 3, 40, 5
CUDA_TOLERANCE = 1e-3
"""Kernels of a GPU may add numbers in another order each time."""


class StageProcess:
    """A stage in its own process, with a line on the terminal that shows its steps."""

    def __init__(self, title: str, command: list[str], folder: Path) -> None:
        self.title, self.folder, self.log = title, folder, folder.with_suffix(".log")
        self._begin = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)

    def wait(self, kill_after: int = 0, delay: float = 0) -> bool:
        """Wait for the end; with a step, kill the process some seconds after it. True if killed."""
        reached: float | None = None
        while self.process.poll() is None:
            step = self.last_step()
            if reached is None and kill_after and step >= kill_after:
                reached = time.monotonic()
            if reached is not None and time.monotonic() - reached >= delay:
                self.stop()
                return True
            self._show(f"step {step}", end="")
            time.sleep(0.02)
        if self.process.returncode:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise UserError(
                f"{self.title} failed with exit code {self.process.returncode}:\n{tail}"
            )
        return False

    def last_step(self) -> int:
        """Return the last step that the run logged."""
        with contextlib.suppress(OSError):
            rows = read_metrics(self.folder)
            return int(max((row["step"] for row in rows if TRAIN_LOSS in row), default=0))
        return 0

    def stop(self) -> None:
        """Kill the process, if it is still running."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def report(self, text: str) -> None:
        """Print what happened, and how long it took."""
        self._show(f"{text}, {time.monotonic() - self._begin:.0f} s", end="\n")

    def _show(self, text: str, end: str) -> None:
        terminal = sys.stdout.isatty()
        if terminal or end:
            clear = "\r\033[K" if terminal else ""
            print(f"{clear}{self.title:<13}{text}", end=end, flush=True)


def stage_of(config: str) -> str:
    """Return the stage that the name of a config file says; raise UserError if it says none."""
    name = Path(config).stem.removeprefix("tiny_")
    for stage in STAGES:
        if name.startswith(stage):
            return stage
    names = ", ".join(f"{stage}_NAME.yaml" for stage in STAGES)
    raise UserError(f"{config}: the name does not say which stage it is for. Rename it: {names}.")


def verify(config: str, settings: Sequence[str], seed: int, folder: Path) -> bool:
    """Train undisturbed and with kills, below a folder; print whether it passed, and return it."""
    chance = random.Random(seed)
    own = [f"max_steps={STEPS}", "tokens_per_step=1024", f"save_every_steps={SAVE_EVERY}"]
    own += ["eval_every_steps=0", "log_every_steps=1", "ranks=1"]
    script = [sys.executable, str(ROOT / STAGES[stage_of(config)]), config, *own, *settings]

    def start(title: str, name: str) -> StageProcess:
        return StageProcess(title, [*script, f"out_dir={folder / name}"], folder / name)

    running = start("undisturbed", "undisturbed")
    try:
        running.wait()
        steps = running.last_step()
        running.report(f"{steps} steps")
        if steps <= KILLS:
            raise UserError(f"{steps} steps are too few for {KILLS} kills. Set a longer run.")
        for number, step in enumerate(sorted(chance.sample(range(1, steps), KILLS)), 1):
            running = start(f"kill {number}", "killed")
            killed = running.wait(step, chance.uniform(0, 0.5))
            event = f"killed at step {running.last_step()}" if killed else "ended before the kill"
            running.report(f"{_resumed(running.log)}{event}")
        running = start("typed again", "killed")
        running.wait()
        running.report(f"{_resumed(running.log)}{running.last_step()} steps")
    finally:
        running.stop()
    return compare_weights(folder / "undisturbed", folder / "killed", steps)


def _resumed(log: Path) -> str:
    """Return from which step the last process in a log resumed, as the start of a sentence."""
    text = log.read_text(errors="replace")
    last = text[text.rfind("parameters, vocabulary size") :]
    found = re.search(r"resuming from \S*step_0*(\d+)", last)
    return f"resumed from step {found[1]}, " if found else ""


def compare_weights(a: Path, b: Path, steps: int) -> bool:
    """Print PASS or the first tensor that differs; return whether it passed."""
    on_cuda = re.search(r" on cuda", a.with_suffix(".log").read_text(errors="replace"))
    names = ["final/model.safetensors", f"step_{steps:06d}/optimizer.safetensors"]
    for name in names[:1] if on_cuda else names:
        difference = first_difference(a / name, b / name)
        if difference and not (on_cuda and difference[1] <= CUDA_TOLERANCE):
            print(f"FAIL         {name}: {difference[0]} differs by up to {difference[1]:.3g}")
            return False
    result = "all weights and the state of the optimizers are equal bit for bit"
    if on_cuda:
        result = (
            f"no weight differs by more than {CUDA_TOLERANCE:g}. They are not equal bit for bit: "
        )
        result += "kernels of a GPU may add numbers in another order each time"
    print(f"PASS         after {KILLS} kills, {result}")
    return True


def main() -> int:
    """Check a config; return the exit code."""
    use_replacement_characters()
    parser = argparse.ArgumentParser(
        prog="python -m tools.verify_resume", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("settings", nargs="*", metavar="config.yaml section.key=value",
                        help=f"as for a stage (default {DEFAULT})")  # fmt: skip
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32),
                        help="seed of the moments of the kills (default: random)")  # fmt: skip
    arguments = parser.parse_args()
    words = arguments.settings
    config = words.pop(0) if words and "=" not in words[0] else DEFAULT
    for word in words:
        if re.match(r"(out_dir|resume|save_every_steps=0\b)", word) or "=" not in word:
            parser.error(f"{word}: expected section.key=value; out_dir, resume and "
                         "save_every_steps=0 are not possible here")  # fmt: skip
    if not Path(config).is_file():
        parser.error(f"{config}: no such config file")
    folder = Path(tempfile.mkdtemp(prefix="verify_resume-"))
    print(f"{config}, seed {arguments.seed}, in {folder}")
    try:
        passed = verify(config, words, arguments.seed, folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        passed = False
    if passed:
        shutil.rmtree(folder)
    else:
        print(f"The logs and both runs are in {folder}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
