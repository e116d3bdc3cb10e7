"""Protects the model on a card: fp32 against the CPU's, the run's precision against fp32."""

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
    """Return the gradient of the summed loss as one vector, on the CPU."""
    found = torch.autograd.grad(loss_fn(model, batch)[0], list(model.parameters()))
    return torch.cat([part.flatten().cpu() for part in found])


@pytest.fixture(scope="module")
def both(machine):
    """One model on the CPU and on the device, with two rows of data each."""
    torch.manual_seed(0)
    on_cpu = Transformer(machine.sizes)
    for name, parameter in on_cpu.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.normal_(std=0.02)  # As zeros, as it begins, they would hide the rest.
    model = Transformer(machine.sizes)
    model.load_state_dict(on_cpu.state_dict())
    batch = machine.batch(2)
    return SimpleNamespace(
        cpu=on_cpu,
        cpu_batch=batch.to(torch.device("cpu")),
        model=model.to(machine.choice.device),
        batch=batch,
    )


def test_logits_in_fp32(both, report):
    with torch.no_grad():
        expected = both.cpu(**{**both.cpu_batch.inputs, "select": None})
        found = both.model(**{**both.batch.inputs, "select": None})
    error = float((found.cpu() - expected).abs().max())
    report("logits in fp32", f"off by {error:.1e} from the CPU's", "1e-03")
    assert error < 1e-3


def test_gradient_in_fp32(both, report):
    expected = gradient(both.cpu, both.cpu_batch)
    error = float((gradient(both.model, both.batch) - expected).norm() / expected.norm())
    report("gradient in fp32", f"off by {error:.1e} of the CPU's norm", "1e-03")
    assert error < 1e-3


def test_loss_in_the_precision_of_a_run(both, machine, report):
    with torch.no_grad():
        exact, _ = loss_fn(both.model, both.batch)
    hardware = choose_kernels(machine.hardware(), machine.sizes, LENGTH, SINGLE_PROCESS)
    with torch.no_grad(), hardware.autocast():
        rounded, _ = loss_fn(both.model, both.batch)
    ratio = float(rounded / exact) - 1
    report(f"loss in {hardware.precision}", f"{ratio:+.2%} of that in fp32", "0.5%")
    assert abs(ratio) < 0.005
