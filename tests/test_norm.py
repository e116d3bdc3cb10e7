"""Protects the norm of a CPU, which is held to torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.fused_cpu import Normed, rms_norm


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of three heads of 16 values, not side by side in memory."""
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 16, 5, 3, dtype=torch.float64)).to(dtype).permute(0, 2, 3, 1)
    weight = 1 + torch.randn(16, dtype=torch.float64).to(dtype)
    return x.detach().requires_grad_(), weight.detach().requires_grad_()


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_value_and_gradients_are_those_of_torch(eps):
    x, weight = inputs()
    assert torch.autograd.gradcheck(lambda *xs: Normed.apply(*xs, eps), (x, weight))
    ours, theirs = rms_norm(x, weight, eps), F.rms_norm(x, weight.shape, weight, eps)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(ours)
    wanted = torch.autograd.grad(theirs, (x, weight), g)
    torch.testing.assert_close(torch.autograd.grad(ours, (x, weight), g), wanted)


def test_16_bit_numbers_are_summed_in_32():
    x, weight = inputs(torch.bfloat16)
    exact = F.rms_norm(x.float(), weight.shape, weight.float(), 1e-6)
    both = rms_norm(x, weight, 1e-6)
    assert both.dtype == torch.bfloat16  # A model of 16-bit weights stays one.
    assert torch.equal(both, exact.to(torch.bfloat16))
    mixed = rms_norm(x, weight.float(), 1e-6)  # As under autocast.
    torch.testing.assert_close(mixed, exact, rtol=1e-6, atol=1e-6)
    for out in (both, mixed):
        dx, dw = torch.autograd.grad(out.float().square().sum(), (x, weight))
        assert dx.dtype == dw.dtype == torch.bfloat16 and dx.isfinite().all() and dw.any()


def test_a_row_of_zeros_has_a_gradient():
    x, weight = inputs(torch.float32)
    with torch.no_grad():
        x[0] = 0
    rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_is_plain(dtype):
    """Under autocast too, which compiled and plain code may see differently."""
    x, weight = inputs(dtype)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            plain = rms_norm(x, weight.float(), 1e-6)
            torch.testing.assert_close(compiled(x, weight.float(), 1e-6), plain)
        assert plain.dtype == torch.float32


def test_backward_inside_autocast_is_exact():
    x, weight = inputs(torch.float32)
    wanted = torch.autograd.grad(rms_norm(x, weight, 1e-6).square().sum(), (x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(rms_norm(x, weight, 1e-6).square().sum(), (x, weight))
    torch.testing.assert_close(found, wanted)


def test_less_is_kept_than_by_torch():
    """Bytes that autograd holds between forward and backward."""
    held: list[int] = []

    def kept(function) -> int:
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: held.append(t.untyped_storage().nbytes()) or t, lambda t: t
        ):
            function()
        return sum(held)

    x, weight = inputs(torch.float32)
    ours = kept(lambda: rms_norm(x, weight, 1e-6))
    assert x.numel() * 4 <= ours < 1.5 * x.numel() * 4
    assert ours < kept(lambda: F.rms_norm(x, weight.shape, weight, 1e-6)) / 1.5
