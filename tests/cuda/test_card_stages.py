"""Tests for the stages on a GPU, each for twenty steps; pretraining is killed and resumed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from model import ModelConfig
from tests.cuda.card import TINY

pytestmark = pytest.mark.cuda
ROOT = Path(__file__).resolve().parents[2]
STAGES = {"pretrain": "train.py", "sft": "sft_train.py", "dpo": "dpo_train.py"}
STEPS = 20


def losses_of(stage, machine, *more):
    """Run a stage to completion; return the losses of its steps and its output."""
    words, out_dir, env = command(stage, machine, *more)
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env)
    out = result.stdout + result.stderr
    assert result.returncode == 0, out[-2000:]
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").open(encoding="utf-8")]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    return losses, out


def command(stage, machine, *more):
    """Return a run's command, folder and environment variables."""
    out_dir = machine.folder / stage
    words = [sys.executable, STAGES[stage], f"configs/tiny_{stage}.yaml", f"out_dir={out_dir}",
             f"data.files={machine.folder / stage}.jsonl", f"max_steps={STEPS}",
             f"device={machine.choice.device}", "tokens_per_step=4096", "eval_every_steps=0",
             "log_every_steps=1", "data.val_max_rows=2", "ranks=1", *more]  # fmt: skip
    env = {**os.environ, "TRAIN_LLM_CACHE_DIR": str(machine.folder / "cache")}
    return words, out_dir, env


def test_killed_pretraining_resumes_and_the_loss_falls(machine, report):
    default = asdict(ModelConfig())
    sizes = [f"model.{k}={v}" for k, v in asdict(TINY).items() if v != default[k]]
    more = [*sizes, "save_every_steps=5"]
    words, out_dir, env = command("pretrain", machine, *more)
    null = subprocess.DEVNULL
    process = subprocess.Popen(words, stdout=null, stderr=null, cwd=ROOT, env=env)
    while process.poll() is None and not (out_dir / "latest").exists():
        time.sleep(0.05)
    process.kill()
    process.wait()
    losses, out = losses_of("pretrain", machine, *more)
    figure = f"loss {losses[0]:.3f} to {losses[-1]:.3f}, killed and resumed"
    report("pretrain", figure, "loss falls")
    assert "resuming from" in out and losses[-1] < losses[0]


def test_fine_tuning_has_finite_losses(machine, report):
    losses, _ = losses_of("sft", machine, f"init_from={machine.folder}/pretrain/final")
    report("sft", f"loss {losses[0]:.3f} to {losses[-1]:.3f}", "finite")


def test_preference_optimization_starts_at_ln_2(machine, report):
    losses, _ = losses_of("dpo", machine, f"init_from={machine.folder}/sft/final")
    report("dpo", f"loss {losses[0]:.3f} to {losses[-1]:.3f}", "starts at ln 2 +- 0.005")
    assert abs(losses[0] - math.log(2)) < 5e-3
