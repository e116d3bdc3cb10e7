"""The second half of a SwiGLU layer, which keeps its two inputs, and no activation beside them.

silu and the product are cheap, and the widest of all activations: they are made again in backward,
as a compiled layer does by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def gated_down(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """(silu(gate) * up) weight^T. Source: arXiv:2002.05202, equation 6.

    Shapes: gate, up (..., F), weight (D, F) -> (..., D).
    """
    if torch.compiler.is_compiling():
        return F.linear(F.silu(gate) * up, weight)
    return GatedDown.apply(gate, up, weight.to(gate.dtype))  # type: ignore[no-any-return]


class GatedDown(torch.autograd.Function):
    """gated_down of one dtype, whatever autocast is around it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        """Keeps what it is given."""
        ctx.save_for_backward(gate, up, weight)
        with torch.autocast(gate.device.type, enabled=False):
            return F.linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of gate, up and weight; what is no longer needed is overwritten."""
        gate, up, weight = ctx.saved_tensors
        d_weight = None
        with torch.autocast(gate.device.type, enabled=False):
            activated = F.silu(gate)
            if ctx.needs_input_grad[2]:
                d_weight = gradients[0].flatten(0, -2).mT @ (activated * up).flatten(0, -2)
            d_product = gradients[0] @ weight
            d_up = activated.mul_(d_product)
            d_gate = torch.ops.aten.silu_backward(d_product.mul_(up), gate)
        return d_gate, d_up, d_weight
