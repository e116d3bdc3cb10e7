"""Tests that the model in fp32 matches the CPU, and that the run's precision matches fp32."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from model import Transformer
from tests.cuda.card import LENGTH
from train import loss_fn
from trainlib.core.distributed import SINGLE_PROCESS
from trainlib.engine.kernels import choose_kernels

pytestmark = pytest.mark.cuda


def gradient(model, batch):
    """Return the gradient of the summed loss as one vector on the CPU."""
    found = torch.autograd.grad(loss_fn(model, batch)[0], list(model.parameters()))
    return torch.cat([part.flatten().cpu() for part in found])


@pytest.fixture(scope="module")
def both(machine):
    """Return the same model, and the same two rows of data, on the CPU and on the device."""
    torch.manual_seed(0)
    on_cpu = Transformer(machine.sizes)
    for name, parameter in on_cpu.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.normal_(std=0.02)  # These start as zeros, which would hide errors.
    model = Transformer(machine.sizes)
    model.load_state_dict(on_cpu.state_dict())
    batch = machine.batch(2)
    return SimpleNamespace(
        cpu=on_cpu,
        cpu_batch=batch.to(torch.device("cpu")),
        model=model.to(machine.choice.device),
        batch=batch,
    )


def test_fp32_logits_match_the_cpu(both, report):
    with torch.no_grad():
        expected = both.cpu(**{**both.cpu_batch.inputs, "select": None})
        found = both.model(**{**both.batch.inputs, "select": None})
    error = float((found.cpu() - expected).abs().max())
    report("logits in fp32", f"max. difference from the CPU {error:.1e}", "1e-03")
    assert error < 1e-3


def test_fp32_gradient_matches_the_cpu(both, report):
    expected = gradient(both.cpu, both.cpu_batch)
    error = float((gradient(both.model, both.batch) - expected).norm() / expected.norm())
    report("gradient in fp32", f"error {error:.1e} of the CPU gradient's norm", "1e-03")
    assert error < 1e-3


def test_loss_in_the_precision_of_a_run_matches_fp32(both, machine, report):
    with torch.no_grad():
        exact, _ = loss_fn(both.model, both.batch)
    hardware = choose_kernels(machine.hardware(), machine.sizes, LENGTH, SINGLE_PROCESS)
    with torch.no_grad(), hardware.autocast():
        rounded, _ = loss_fn(both.model, both.batch)
    ratio = float(rounded / exact) - 1
    report(f"loss in {hardware.precision}", f"{ratio:+.2%} relative to fp32", "0.5%")
    assert abs(ratio) < 0.005
