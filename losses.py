"""The two losses' ingredients: functions of logits, nothing else.

They use fp32 logits up, the largest tensor of a step: who needs them later hands in a clone.
Everything is a sum; the training loop divides once, by the targets of the whole step. So a
micro-batch with few targets never weighs as much as one with many.

Shapes: B rows, T positions, V vocab_size, C documents of a micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) in nats of each position, in fp32; 0 where the label is IGNORE_INDEX.

    Shapes: logits (..., V), labels (...) -> (N,), all positions in one row. As F.cross_entropy
    with reduction="none", which takes twice the memory of fp32 logits beside them; here they are
    overwritten by the probabilities, and those by the gradient. Of 16-bit logits one fp32 copy is
    made. What computed the logits must not need them in its own backward; a product does not.
    """
    return _TokenLosses.apply(logits.flatten(0, -2), labels.flatten())


class _TokenLosses(torch.autograd.Function):
    """Turns logits into probabilities, and those into the gradient, where they lie."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        under_loss = labels != IGNORE_INDEX
        index = labels.masked_fill(~under_loss, 0).unsqueeze(1)
        behind = logits.amax(1).to(dtype) - logits.gather(1, index).squeeze(1).to(dtype)
        ctx.dtype = logits.dtype
        probabilities = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
        torch.softmax(logits, 1, dtype=dtype, out=probabilities)
        # The largest logit has probability exp(0) / sum: no second pass is needed for the sum, and
        # no logarithm of a label's probability, which may be 0.
        losses = behind - probabilities.amax(1).log()
        ctx.probabilities = probabilities
        ctx.save_for_backward(under_loss, index)
        return losses.masked_fill(~under_loss, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """p - 1 at the label, p elsewhere, times the gradient of the position's loss."""
        under_loss, index = ctx.saved_tensors
        probabilities, ctx.probabilities = ctx.probabilities, None
        if probabilities is None:
            raise RuntimeError("token_losses: its memory is used up by the first backward pass")
        # Where no loss is, what overflowed in 16 bits must not become 0 times infinity.
        probabilities.masked_fill_(~under_loss.unsqueeze(1), 0)
        gradient = gradient.masked_fill(~under_loss, 0).unsqueeze(1)
        probabilities.mul_(gradient).scatter_add_(1, index, -gradient)
        return probabilities.to(ctx.dtype), None


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p(label) in nats over the positions under the loss, in fp32.

    Shapes: logits (..., V); labels (...), already shifted, IGNORE_INDEX where no loss.
    """
    return token_losses(logits, labels).sum()


def sequence_log_probs(
    logits: Tensor, labels: Tensor, document_ids: Tensor, num_documents: int
) -> Tensor:
    """Log-probability of each document's supervised tokens, in nats.

    Shapes: logits (..., V); labels, document_ids (...) -> (C,) with C = num_documents; padding
    has document ids from num_documents on and is left out.
    """
    # One slot more gathers what belongs to no document.
    slots = document_ids.flatten().clamp(max=num_documents)
    losses = token_losses(logits, labels)
    return losses.new_zeros(num_documents + 1).index_add(0, slots, -losses)[:num_documents]
