"""Protects the rotation of a plain run, which is held to the one that a compiler is given."""

from __future__ import annotations

import pytest
import torch

from rotary import Turned, rotary_angles, rotate


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heads as a layer hands them over, not side by side in memory, and their positions' angles."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64).to(dtype).transpose(1, 2)
    angles = rotary_angles(torch.tensor([[0, 1, 2, 0, 1], [3, 4, 90, 91, 0]]), 8, 100.0)
    return x.detach().requires_grad_(), *angles  # In fp32, as a model makes them.


def test_gradient_is_that_of_the_value():
    x, cos, sin = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), x)
    assert isinstance(rotate(x, cos, sin).grad_fn, Turned._backward_cls)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_is_plain(dtype):
    x, cos, sin = inputs(dtype)
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    found, wanted = rotate(x, cos, sin), compiled(x, cos, sin)
    assert found.dtype == wanted.dtype == dtype
    # Of 16-bit numbers each pass rounds, and here they are fewer.
    close = {"rtol": 1e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, wanted, **close)
    g = torch.randn_like(found)
    (ours,), (theirs,) = (torch.autograd.grad(out, x, g) for out in (found, wanted))
    torch.testing.assert_close(ours, theirs, **close)
