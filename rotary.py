"""The rotary embedding, on a CPU in few passes over memory.

A compiler makes one kernel of it; a plain run gets six operators on halves of a head and one that
joins them, forward and backward. Written out below it takes four, and writes half as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, in fp32 whatever the precision of the model.

    Shapes: position_ids (B, T) -> two of (B, 1, T, head_dim / 2), one for all heads.
    Source: arXiv:2104.09864, equation 15.
    """
    pairs = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    inverse_frequency = theta ** (-pairs / head_dim)
    angles = position_ids[:, None, :, None].float() * inverse_frequency
    return angles.cos(), angles.sin()


def rotate(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + H/2) of a head by its position's angle (the Hugging Face layout)."""
    cos, sin = cos.to(x_BNTH.dtype), sin.to(x_BNTH.dtype)
    if x_BNTH.device.type == "cpu" and not torch.compiler.is_compiling():
        return Turned.apply(x_BNTH, cos, sin)  # type: ignore[no-any-return]
    first, second = x_BNTH.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Turned(torch.autograd.Function):
    """rotate; its gradient is turned back by the same angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Keeps the angles alone."""
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of x."""
        cos, sin = ctx.saved_tensors
        return _turn(gradients[0], cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Each pair turned by its angle, or by -1 times that."""
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x)
    turned_first, turned_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=turned_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=turned_second).addcmul_(first, sin, value=sign)
    return out
