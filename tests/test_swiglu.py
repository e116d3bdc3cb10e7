"""Protects the feed-forward layer's second half, which is held to the formula written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from swiglu import GatedDown, gated_down


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 5, 12), (2, 5, 12), (8, 12))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def plain(gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (F.silu(gate) * up) @ weight.to(gate.dtype).mT


def test_gradients_are_those_of_the_value():
    assert torch.autograd.gradcheck(GatedDown.apply, inputs(torch.float64))


@pytest.mark.parametrize("autocast", [False, True])
def test_value_and_gradients_are_the_formulas(autocast):
    gate, up, weight = inputs(torch.float32)
    dtype = torch.bfloat16 if autocast else torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours, theirs = (f(gate.to(dtype), up.to(dtype), weight) for f in (gated_down, plain))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs)
    g = torch.randn_like(ours)
    found, wanted = (torch.autograd.grad(out, (gate, up, weight), g) for out in (ours, theirs))
    torch.testing.assert_close(found, wanted)


def test_inside_autocast_fp32_stays_exact():
    ours = inputs(torch.float32)
    value = gated_down(*ours)
    wanted = torch.autograd.grad(value.square().sum(), ours)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gated_down(*ours)
        found = torch.autograd.grad(inside.square().sum(), ours)
    torch.testing.assert_close((inside, *found), (value, *wanted))


def test_a_frozen_weight_gets_no_gradient():
    gate, up, weight = inputs(torch.float32)
    gated_down(gate, up, weight.detach()).sum().backward()
    assert gate.grad is not None and up.grad is not None and weight.grad is None


def test_only_the_inputs_are_kept():
    held: list[torch.Tensor] = []
    ours = inputs(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        gated_down(*ours)
    assert {t.data_ptr() for t in held} == {t.data_ptr() for t in ours} and len(held) == 3
