"""Tests for runs on limited machines: fp16 loss scaling, no compiler, a closed terminal."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trainlib.core.distributed import DistributedContext
from trainlib.core.hardware import Hardware
from trainlib.data.epoch_plan import DataPosition
from trainlib.data.loader import StepBatch
from trainlib.engine.optim import OptimConfig, build_optimizers
from trainlib.engine.step import optimizer_step
from trainlib.engine.train_state import SCALE_STEPS, TrainState

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


class Rows(SimpleNamespace):
    """A micro-batch of numbers."""

    def to(self, device):
        return self


def step(model, optimizers, precision, scale, x, target):
    """Run one optimizer step on the mean squared error of x."""
    hardware = Hardware(CPU, precision, "masked", False, 1)
    run = SimpleNamespace(
        hardware=hardware,
        distributed=DistributedContext(),
        config=SimpleNamespace(optim=OptimConfig()),
    )

    def loss_fn(model, batch):
        error = (model(batch.x).float() - target).square().sum()
        return error, {"error": (error, len(batch.x))}

    batch = StepBatch([Rows(x=x)], len(x), len(x), DataPosition())
    training = SimpleNamespace(run=run, model=model, optimizers=optimizers, loss_fn=loss_fn)
    return optimizer_step(training, batch, scale)  # type: ignore[arg-type]


def test_fp16_losses_match_fp32_losses():
    x, target = torch.randn(16, 8), torch.randn(16, 8)
    losses = {}
    for precision, scale in (("fp32", 1.0), ("fp16", 2.0**10)):
        torch.manual_seed(0)
        model = nn.Linear(8, 8, bias=False)
        optimizers = build_optimizers(model, OptimConfig())
        losses[precision] = [
            step(model, optimizers, precision, scale, x, target).loss for _ in range(20)
        ]
    assert losses["fp16"][-1] < 0.8 * losses["fp16"][0]
    for half, full in zip(losses["fp16"], losses["fp32"], strict=True):
        assert half == pytest.approx(full, rel=0.02)
    assert losses["fp16"] != losses["fp32"]  # fp16 was really used.


def test_loss_scaling_preserves_small_gradients():
    """A gradient of 1e-8 underflows in fp16 (smallest number: 6e-8), unless the loss is scaled."""
    norms = {}
    for scale in (1.0, 2.0**16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        optimizers = build_optimizers(model, OptimConfig(name="adamw"))
        x = torch.full((2, 4), 1e-4)
        norms[scale] = step(model, optimizers, "fp16", scale, x, torch.zeros(4)).grad_norm
    exact = step(model, optimizers, "fp32", 1.0, x, torch.zeros(4)).grad_norm
    assert norms[2.0**16] == pytest.approx(exact, rel=0.2) and exact > 0
    assert norms[1.0] < norms[2.0**16] / 2


def test_an_overflow_skips_the_step_and_halves_the_scale():
    model = nn.Linear(8, 8, bias=False)
    optimizers = build_optimizers(model, OptimConfig())
    before = model.weight.detach().clone()
    state = TrainState(loss_scale=2.0**30)
    result = step(model, optimizers, "fp16", 2.0**30, torch.ones(4, 8), torch.full((8,), 1e4))
    assert not result.finite and torch.equal(model.weight, before)
    batch = StepBatch([], 4, 4, DataPosition(0, 1))
    state.advance(batch, result.finite)
    # An overflow is part of finding the scale and does not count as a bad step.
    assert (state.loss_scale, state.bad_steps, state.step) == (2.0**29, 0, 1)
    for _ in range(SCALE_STEPS):
        state.advance(batch, True)
    assert state.loss_scale == 2.0**30
    plain = TrainState()
    plain.advance(batch, math.isfinite(math.nan))
    assert (plain.loss_scale, plain.bad_steps) == (1.0, 1)


# ---- complete runs -------------------------------------------------------------------------------

SETTINGS = [
    "configs/tiny_pretrain.yaml", "model.hidden_size=32", "model.intermediate_size=48",
    "model.num_hidden_layers=2", "model.num_attention_heads=2", "model.num_key_value_heads=1",
    "model.head_dim=16", "tokens_per_step=512", "sequence_length=64", "log_every_steps=1",
    "save_every_steps=0", "device=cpu", "data.files=a.jsonl", "data.val_fraction=0.1",
]  # fmt: skip


FAULTS = """
import resource, sys, torch
from trainlib.engine.device import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for step in range(20):
    if step == 15:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not from glibc")
def test_freed_memory_is_kept():
    """Five allocations of 40 MB cause no page faults, instead of about 50,000."""
    env = {k: v for k, v in os.environ.items() if "MALLOC" not in k and k != "LD_PRELOAD"}
    env.pop("GLIBC_TUNABLES", None)
    keeping, default = (
        int(
            subprocess.check_output([sys.executable, "-c", FAULTS, w], text=True, cwd=ROOT, env=env)
        )
        for w in ("keep", "default")
    )
    assert keeping < default / 10


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Return a folder with configs and a data file."""
    path = tmp_path_factory.mktemp("runtime")
    (path / "configs").symlink_to(ROOT / "configs")
    rows = ({"text": f"第{i}条 the text of row {i}. " * (i % 9 + 1)} for i in range(99))
    (path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def start(workdir, *settings, env=(), **options):
    environment = {**os.environ, "TRAIN_LLM_CACHE_DIR": str(workdir / "cache"),
                   "OMP_NUM_THREADS": "1", **dict(env)}  # fmt: skip
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *SETTINGS, *settings], cwd=workdir,
        env=environment, text=True, **options,
    )  # fmt: skip


def run(workdir, *settings, code=0, env=()):
    process = start(workdir, *settings, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == code, out
    return out


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_an_fp16_run_learns(workdir):
    run(workdir, "out_dir=fp16", "precision=fp16", "max_steps=20", "eval_every_steps=0")
    rows = metrics(workdir / "fp16")
    assert rows[-1]["val/loss"] < rows[0]["val/loss"] - 0.3
    state = json.loads((workdir / "fp16/step_000020/train_state.json").read_text())
    assert state["train"]["loss_scale"] > 1


@pytest.mark.slow
def test_compile_on_without_a_compiler_is_an_error(workdir):
    broken = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(workdir / "inductor")}
    out = run(workdir, "out_dir=required", "compile=on", "max_steps=2", code=1, env=broken.items())
    assert "compile=on, but compilation failed" in out and "Traceback" not in out


@pytest.mark.slow
def test_a_compiled_run_evaluates_and_samples(workdir):
    """Each generated token changes the length, which must not recompile the layers."""
    if shutil.which("g++") is None:
        pytest.skip("compilation requires g++")
    out = run(workdir, "out_dir=compiled", "compile=on", "max_steps=4", "eval_every_steps=2")
    assert "compiled in" in out
    run(workdir, "out_dir=plain", "compile=off", "max_steps=4", "eval_every_steps=2")
    for ours, theirs in zip(metrics(workdir / "compiled"), metrics(workdir / "plain"), strict=True):
        for name in ("train/loss", "val/loss"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-3)


def wait_for_step(folder, step, process):
    log = folder / "train.log"
    while process.poll() is None and not (log.exists() and f"step {step} " in log.read_text()):
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before the test could act"


def test_a_run_survives_a_closed_terminal(workdir):
    """When the window is closed, SIGHUP arrives and writes to the terminal fail with EIO."""
    master, slave = pty.openpty()
    process = start(
        workdir, "out_dir=closed", "max_steps=60", stdin=slave, stdout=slave, stderr=slave,
        start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    wait_for_step(workdir / "closed", 3, process)
    os.close(master)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0
    assert (workdir / "closed/final/model.safetensors").exists()
    assert [r["step"] for r in metrics(workdir / "closed") if "train/loss" in r] == [*range(1, 61)]
    assert "step 60 loss" in (workdir / "closed/train.log").read_text()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_run_prints_every_line_if_stdout_lacks_a_character(workdir, encoding):
    """The samples of an evaluation have Chinese text."""
    env = {"PYTHONIOENCODING": encoding}
    out = run(workdir, f"out_dir={encoding}", "max_steps=4", "eval_every_steps=2", env=env.items())
    assert "???" in out and "\nstep 4 " in out and f"init_from={encoding}/final" in out


def test_a_run_survives_a_closed_pipe(workdir):
    process = start(
        workdir, "out_dir=pipe", "max_steps=40", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for_step(workdir / "pipe", 2, process)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert (workdir / "pipe/final").is_dir()


def test_a_run_continues_although_nobody_reads_its_output(workdir):
    """A pager that is paused, for example; the run also stops at SIGTERM."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    folder = workdir / "unread"
    process = start(workdir, "out_dir=unread", "max_steps=100000", stdout=writer, stderr=writer)
    os.close(writer)
    wait_for_step(folder, 1, process)
    time.sleep(8)
    before = len(metrics(folder))
    time.sleep(2)
    assert len(metrics(folder)) > before
    process.send_signal(signal.SIGTERM)
    while not (folder / "latest").exists():
        time.sleep(0.05)
    text = b""
    while part := os.read(reader, 1 << 16):
        text += part
    assert process.wait(timeout=60) == 0
    assert re.search(rb"\n[\d,]+ lines were not shown; all of them are in unread/train.log\n", text)


def test_a_run_whose_folder_is_moved_ends_in_one_line(workdir):
    process = start(
        workdir, "out_dir=moved", "max_steps=100000", "save_every_steps=5", stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_step(workdir / "moved", 7, process)
    (workdir / "moved").rename(workdir / "elsewhere")
    _, error = process.communicate(timeout=60)
    lines = [line for line in error.splitlines() if "%|" not in line]
    assert process.returncode == 1 and len(lines) == 1
    assert lines[0].startswith("error: moved was moved or removed")
    assert not (workdir / "moved").exists()


@pytest.mark.parametrize("seconds", [0.4, "running"])
def test_ctrl_c_before_training_ends_in_one_line(workdir, seconds):
    process = start(workdir, f"out_dir=early{seconds}", "max_steps=9", stderr=subprocess.PIPE,
                    stdout=subprocess.PIPE)  # fmt: skip
    if seconds == "running":
        assert process.stdout and process.stdout.readline()
    else:
        time.sleep(seconds)  # While torch is imported.
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "interrupted\n")


@pytest.mark.slow
def test_a_finish_file_ends_a_run_and_a_resume_continues_the_decay(workdir):
    settings = ["max_hours=1", "save_every_steps=1", "eval_every_steps=0"]
    process = start(workdir, "out_dir=hours", *settings, stdout=subprocess.DEVNULL)
    folder = workdir / "hours"
    wait_for_step(folder, 40, process)
    (folder / "FINISH").touch()
    wait_for_step(folder, 50, process)
    process.kill()  # In the middle of the decay.
    process.wait()
    assert "resuming from" in run(workdir, "out_dir=hours", *settings)
    rates = [(row["step"], row["train/lr"]) for row in metrics(folder) if "train/lr" in row]
    peak = max(rate for _, rate in rates)
    last_at_peak = max(step for step, rate in rates if rate == peak)
    assert rates[-1][0] == pytest.approx(1.5 * last_at_peak, abs=2)  # decay_fraction is 0.5.
    assert rates[-1][1] < peak * 0.1
    assert (folder / "final").is_dir()
