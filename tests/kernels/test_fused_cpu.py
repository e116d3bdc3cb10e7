"""Tests that each fused CPU function matches the plain formula in model.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model
from kernels import fused_cpu


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def norm_inputs(dtype: torch.dtype) -> list[Tensor]:
    """Return non-contiguous heads of 16 values, and a weight."""
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 16, 5, 3, dtype=torch.float64)).to(dtype).permute(0, 2, 3, 1)
    return [x.detach().requires_grad_(), (1 + normal(16)).to(dtype).detach().requires_grad_()]


def rotary_inputs(dtype: torch.dtype) -> list[Tensor]:
    """Return non-contiguous heads, as a layer passes them, and angles in fp32."""
    torch.manual_seed(0)
    x = normal(2, 5, 3, 8, dtype=dtype).transpose(1, 2).detach().requires_grad_()
    position_ids = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 90, 91, 0]])
    return [x, *model.rotary_angles(position_ids, 8, 100.0)]


def swiglu_inputs(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [normal(*shape, dtype=dtype) for shape in ((2, 5, 12), (2, 5, 12), (8, 12))]


def norm(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, weight: function(x, weight, 1e-6)


CASES = {
    "rms_norm": (norm_inputs, norm(fused_cpu.rms_norm), norm(model.rms_norm)),
    "rotate": (rotary_inputs, fused_cpu.rotate, model.rotate),
    "swiglu": (swiglu_inputs, fused_cpu.swiglu, model.swiglu),
}


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(output.shape, generator=generator).to(output)
    return torch.autograd.grad(output, [x for x in inputs if x.requires_grad], g)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_numerical_gradients(name):
    make, fused, _ = CASES[name]
    inputs = make(torch.float64)
    assert torch.autograd.gradcheck(fused, inputs)
    assert "Function" in type(fused(*inputs).grad_fn).__name__  # Not the plain formula.


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients_match_the_formula(name, dtype):
    """In bf16, each pass over memory rounds, and the fused functions make fewer passes."""
    make, fused, plain = CASES[name]
    inputs = make(dtype)
    ours, theirs = fused(*inputs), plain(*inputs)
    assert ours.dtype == theirs.dtype == dtype
    rtol, atol = (2e-2, 5e-2) if dtype == torch.bfloat16 else (1e-5, 1e-5)
    our_gradients, their_gradients = gradients(ours, inputs), gradients(theirs, inputs)
    for one, other in zip((ours, *our_gradients), (theirs, *their_gradients), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", CASES)
def test_autocast_does_not_change_results_in_fp32(name):
    make, fused, _ = CASES[name]
    inputs = make(torch.float32)
    value = fused(*inputs)
    expected = gradients(value, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual_value = fused(*inputs)
        actual = gradients(actual_value, inputs)
    torch.testing.assert_close((actual_value, *actual), (value, *expected))


def test_dtypes_and_values_match_the_formulas_under_autocast():
    """As in a run, inputs have 16 bits and weights 32: the norm returns fp32, SwiGLU 16 bits."""
    for name in ("rms_norm", "swiglu"):
        make, fused, plain = CASES[name]
        *inputs, weight = make(torch.bfloat16)
        weight = weight.detach().float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, theirs = fused(*inputs, weight), plain(*inputs, weight)
        assert ours.dtype == theirs.dtype
        assert ours.dtype == (torch.float32 if name == "rms_norm" else torch.bfloat16)
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_rms_norm_sums_16_bit_values_in_fp32():
    x, weight = norm_inputs(torch.bfloat16)
    exact = F.rms_norm(x.float(), weight.shape, weight.float(), 1e-6)
    for function in (fused_cpu.rms_norm, model.rms_norm):
        both = function(x, weight, 1e-6)
        assert both.dtype == torch.bfloat16  # With 16-bit weights, the output is 16-bit.
        torch.testing.assert_close(both, exact.to(torch.bfloat16), rtol=1e-2, atol=1e-2)
        mixed = function(x, weight.float(), 1e-6)  # As under autocast.
        torch.testing.assert_close(mixed, exact, rtol=1e-6, atol=1e-6)


def test_a_row_of_zeros_has_a_finite_gradient():
    x, weight = norm_inputs(torch.float32)
    with torch.no_grad():
        x[0] = 0
    fused_cpu.rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad[0].any()


def test_a_frozen_weight_gets_no_gradient():
    gate, up, weight = swiglu_inputs(torch.float32)
    fused_cpu.swiglu(gate, up, weight.detach()).sum().backward()
    assert gate.grad is not None and up.grad is not None and weight.grad is None


def saved_bytes(function: Callable[..., Tensor], inputs: list[Tensor]) -> int:
    """Return the bytes that autograd saves for backward, counting each storage once."""
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # Kept alive, so no address is reused.
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        output = function(*inputs)
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def test_fused_functions_save_fewer_bytes_for_backward():
    x, weight = norm_inputs(torch.float32)
    ours = saved_bytes(norm(fused_cpu.rms_norm), [x, weight])
    assert x.numel() * 4 <= ours < 1.5 * x.numel() * 4
    assert ours < saved_bytes(norm(model.rms_norm), [x, weight]) / 1.5
    inputs = swiglu_inputs(torch.float32)
    assert saved_bytes(fused_cpu.swiglu, inputs) == sum(4 * x.numel() for x in inputs)
