"""Protects steps on a card: they compile once and wait for nothing. Memory and speed, measured."""

from __future__ import annotations

import time

import pytest
import torch

from tests.cuda.card import Trainer
from train import loss_fn
from trainlib.engine.device import evaluation_mode
from trainlib.engine.flops import flops_per_token, matmul_peak

pytestmark = pytest.mark.cuda
WARM, STEPS = 3, 10


@pytest.fixture
def trainer(machine):
    """A model after its first steps."""
    trainer = Trainer(machine, min(8, machine.choice.micro_batch_size))
    for _ in range(WARM):
        trainer.step()
    return trainer


def test_steps_compile_nothing_again(trainer, machine, report, monkeypatch):
    compiled = trainer.hardware.compile
    check = "compiled once" if compiled else "uncompiled steps"
    report(check, f"{STEPS} steps and an evaluation", "no compilation")
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", compiled)
    for _ in range(STEPS):
        trainer.step()
    with evaluation_mode(trainer.model), trainer.hardware.autocast():
        loss_fn(trainer.model, machine.batch(trainer.hardware.micro_batch_size))
    if machine.choice.compile:
        assert compiled, "the layers could not be compiled (the log says why)"


def test_nothing_waits_for_the_device(trainer, report):
    if trainer.hardware.device.type != "cuda":
        pytest.skip("only a card computes while the program goes on")
    report("no hidden waiting", "copy of a batch, forward and backward", "no wait")
    batch = next(trainer.loader).micro_batches[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = batch.to(trainer.hardware.device)
        with trainer.hardware.autocast():
            loss, _ = loss_fn(trainer.model, batch)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_peak_of_a_step_is_the_predicted_one(machine, report):
    """Of the table's micro batch, uncompiled."""
    if machine.choice.device != "cuda":
        pytest.skip("only a card's allocator counts its peak")
    rows = machine.choice.micro_batch_size
    trainer = Trainer(machine, rows, compile_=False)
    predicted = trainer.predicted_peak(machine, rows)
    trainer.step()
    torch.cuda.reset_peak_memory_stats()
    trainer.step()
    held = torch.cuda.max_memory_allocated()
    figure = f"{held / 1e9:.2f} GB of {predicted / 1e9:.2f} GB predicted, {rows} rows"
    report("peak of a step", figure, "+-15%")
    assert abs(held / predicted - 1) < 0.15


def test_speed_of_the_best_product(machine, report):
    precision = machine.hardware().precision
    peak = matmul_peak(torch.device(machine.choice.device), precision)
    report("best product", f"{peak / 1e12:.2f} TFLOP/s in {precision}")


@pytest.mark.parametrize("how", ["uncompiled", "compiled"])
@pytest.mark.parametrize("share", [8, 2, 1])
def test_speed_of_steps(share, how, machine, report):
    """Of an eighth, of half and of all rows of the table's micro batch."""
    most = machine.choice.micro_batch_size
    rows = max(1, most // share)
    if share > 1 and rows == max(1, most // (share // 2)):
        pytest.skip(f"{rows} rows are measured by another test")
    if how == "compiled" and not machine.choice.compile:
        pytest.skip("layers are not compiled here")
    trainer = Trainer(machine, rows, compile_=how == "compiled")
    if how == "compiled" and not trainer.hardware.compile:
        how = "uncompiled, as compiling failed"
    trainer.step()
    trainer.synchronize()
    begin, before = time.perf_counter(), trainer.tokens
    trainer.step()
    while time.perf_counter() < begin + 3:
        trainer.step()
    trainer.synchronize()
    speed = (trainer.tokens - before) / (time.perf_counter() - begin)
    peak = matmul_peak(trainer.hardware.device, trainer.hardware.precision)
    used = speed * flops_per_token(trainer.model, machine.data.mean_context_length()) / peak
    report(f"{rows} rows, {how}", f"{speed:,.0f} tokens/s, MFU {used:.0%}")
