"""RMSNorm, on a CPU in few passes over memory.

torch's own is one kernel on CUDA, and a compiler makes one of it; a plain run on a CPU gets half a
dozen operators forward and more backward, each of which reads and writes the whole tensor. Written
out below, a training step in fp32 is 3 to 4 % faster, and keeps less.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension, in the wider dtype of the two.

    Shapes: x (..., D), weight (D,) -> (..., D). Source: arXiv:1910.07467, equation 4.
    """
    # As CUDA's autocast does; mixed dtypes would leave its fused kernel.
    wide = torch.promote_types(x.dtype, weight.dtype)
    x, weight = x.to(wide), weight.to(wide)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return Normed.apply(x, weight, eps)  # type: ignore[no-any-return]
    return F.rms_norm(x, weight.shape, weight, eps)


class Normed(torch.autograd.Function):
    """rms_norm of one dtype, computed in fp32 or wider.

    With i = 1 / rms and the gradient g of the result, dx = i g w - x i^3 sum(g w x) / D, and dw is
    the sum over positions of g x i. Both sums are products with a vector, which store nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Keeps x and one value a position."""
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of x and weight."""
        x, weight, inverse = ctx.saved_tensors
        gradient, by = gradients[0].to(inverse.dtype), weight.to(inverse.dtype)
        with torch.autocast(x.device.type, enabled=False):  # Backward may be called in it.
            product = (gradient * x).flatten(0, -2)
            along_x = (product @ by).view_as(inverse) * inverse**3 / -x.shape[-1]
            dx = (gradient * by).mul_(inverse).addcmul_(x, along_x)
            dw = product.mT @ inverse.flatten()
        return dx.to(x.dtype), dw.to(weight.dtype), None
