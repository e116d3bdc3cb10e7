"""Protects the feed-forward layer's second half, which is held to the formula written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from swiglu import MadeAgain, gated_down


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 5, 12), (2, 5, 12), (8, 12))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def plain(gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (F.silu(gate) * up) @ weight.to(gate.dtype).mT


def test_gradients_are_those_of_the_value():
    assert torch.autograd.gradcheck(MadeAgain.apply, inputs(torch.float64))


@pytest.mark.parametrize("autocast", [False, True])
def test_value_and_gradients_are_the_formulas(autocast):
    gate, up, weight = inputs(torch.float32)
    wide = torch.bfloat16 if autocast else torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours, theirs = (f(gate.to(wide), up.to(wide), weight) for f in (gated_down, plain))
        with torch.no_grad():
            assert torch.equal(gated_down(gate.to(wide), up.to(wide), weight), theirs)
    assert ours.dtype == wide
    torch.testing.assert_close(ours, theirs)
    g = torch.randn_like(ours)
    found, wanted = (torch.autograd.grad(out, (gate, up, weight), g) for out in (ours, theirs))
    torch.testing.assert_close(found, wanted)


def test_backward_inside_autocast_is_exact():
    ours = inputs(torch.float32)
    wanted = torch.autograd.grad(gated_down(*ours).square().sum(), ours)
    value = gated_down(*ours).square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(value, ours)
    torch.testing.assert_close(found, wanted)


def test_only_the_inputs_are_kept():
    held: list[torch.Tensor] = []
    ours = inputs(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        gated_down(*ours)
    assert {t.data_ptr() for t in held} == {t.data_ptr() for t in ours} and len(held) == 3
