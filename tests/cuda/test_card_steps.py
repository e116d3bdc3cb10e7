"""Tests for steps on a GPU: no recompilation, no synchronization, predicted memory, speed."""

from __future__ import annotations

import time

import pytest
import torch

from tests.cuda.card import Trainer
from train import loss_fn
from trainlib.engine.device import evaluation_mode
from trainlib.engine.flops import flops_per_token, matmul_peak

pytestmark = pytest.mark.cuda
WARMUP, STEPS = 3, 10


@pytest.fixture
def trainer(machine):
    """Return a trainer that has taken its warmup steps."""
    trainer = Trainer(machine, min(8, machine.choice.micro_batch_size))
    for _ in range(WARMUP):
        trainer.step()
    return trainer


def test_steps_do_not_recompile(trainer, machine, report, monkeypatch):
    compiled = trainer.hardware.compile
    check = "compiled once" if compiled else "uncompiled steps"
    report(check, f"{STEPS} steps and an evaluation", "no recompilation")
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", compiled)
    for _ in range(STEPS):
        trainer.step()
    with evaluation_mode(trainer.model), trainer.hardware.autocast():
        loss_fn(trainer.model, machine.batch(trainer.hardware.micro_batch_size))
    if machine.choice.compile:
        assert compiled, "the layers could not be compiled (the log gives the reason)"


def test_a_micro_batch_does_not_synchronize_with_the_device(trainer, report):
    if trainer.hardware.device.type != "cuda":
        pytest.skip("only CUDA devices run asynchronously")
    report("no synchronization", "copy of a batch, forward and backward", "no wait")
    batch = next(trainer.loader).micro_batches[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = batch.to(trainer.hardware.device)
        with trainer.hardware.autocast():
            loss, _ = loss_fn(trainer.model, batch)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_peak_memory_of_a_step_is_as_predicted(machine, report):
    """The step is uncompiled and uses the hardware table's micro-batch size."""
    if machine.choice.device.type != "cuda":
        pytest.skip("only the CUDA allocator records its peak")
    rows = machine.choice.micro_batch_size
    trainer = Trainer(machine, rows, compile_=False)
    predicted = trainer.predicted_peak(machine, rows)
    trainer.step()
    torch.cuda.reset_peak_memory_stats()
    trainer.step()
    peak = torch.cuda.max_memory_allocated()
    figure = f"{peak / 1e9:.2f} GB, predicted {predicted / 1e9:.2f} GB, {rows} rows"
    report("peak memory of a step", figure, "+-15%")
    assert abs(peak / predicted - 1) < 0.15


def test_speed_of_the_fastest_matmul(machine, report):
    precision = machine.hardware().precision
    peak = matmul_peak(machine.choice.device, precision)
    report("fastest matmul", f"{peak / 1e12:.2f} TFLOP/s in {precision}")


@pytest.mark.parametrize("mode", ["uncompiled", "compiled"])
@pytest.mark.parametrize("divisor", [8, 2, 1])
def test_speed_of_steps(divisor, mode, machine, report):
    """Measure steps with an eighth, a half and all of the rows in the table's micro-batch."""
    full = machine.choice.micro_batch_size
    rows = max(1, full // divisor)
    if divisor > 1 and rows == max(1, full // (divisor // 2)):
        pytest.skip(f"{rows} rows are measured by another test")
    if mode == "compiled" and not machine.choice.compile:
        pytest.skip("layers are not compiled here")
    trainer = Trainer(machine, rows, compile_=mode == "compiled")
    if mode == "compiled" and not trainer.hardware.compile:
        mode = "uncompiled, because compilation failed"
    trainer.step()
    trainer.synchronize()
    begin, before = time.perf_counter(), trainer.tokens
    trainer.step()
    while time.perf_counter() < begin + 3:
        trainer.step()
    trainer.synchronize()
    speed = (trainer.tokens - before) / (time.perf_counter() - begin)
    peak = matmul_peak(trainer.hardware.device, trainer.hardware.precision)
    mfu = speed * flops_per_token(trainer.model, machine.data.mean_context_length()) / peak
    report(f"{rows} rows, {mode}", f"{speed:,.0f} tokens/s, MFU {mfu:.0%}")
