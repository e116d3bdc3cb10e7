"""Parts of the losses: functions of logits, which they leave unchanged.

All are sums; the training loop divides once, by the targets of the whole step. So micro-batches
weigh by their number of targets.

Shapes: B rows, T positions, V vocab_size, C documents of a micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainlib.data.batch import IGNORE_INDEX, Batch


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log p(label) in nats of each position, in fp32; 0 where the label is IGNORE_INDEX.

    As F.cross_entropy with reduction="none" on fp32 logits, in fewer passes over the largest
    tensor of a step. Where no loss is, logits that overflowed in 16 bits give no gradient.
    Shapes: logits (..., V), labels (...) -> (N,), all positions in one row.
    """
    return TokenLossFunction.apply(logits.flatten(0, -2), labels.flatten())


class TokenLossFunction(torch.autograd.Function):
    """Cross-entropy that saves the probabilities, and turns them into the gradient in place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        under_loss = labels != IGNORE_INDEX
        index = labels.masked_fill(~under_loss, 0).unsqueeze(1)
        below_max = logits.amax(1).to(dtype) - logits.gather(1, index).squeeze(1).to(dtype)
        probabilities = torch.empty_like(logits, dtype=dtype)
        # Without `out`, 16-bit logits are converted into a second fp32 tensor.
        torch.softmax(logits, 1, dtype=dtype, out=probabilities)
        # The largest logit has probability exp(0) / sum: no second pass is needed for the sum, and
        # no logarithm of a label's probability, which may be 0.
        losses = below_max - probabilities.amax(1).log()
        ctx.dtype = logits.dtype
        ctx.probabilities = probabilities
        ctx.save_for_backward(under_loss, index)
        return losses.masked_fill(~under_loss, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return p - 1 at the label and p elsewhere, times the gradient of the position's loss."""
        under_loss, index = ctx.saved_tensors
        d_logits, ctx.probabilities = ctx.probabilities, None
        if d_logits is None:
            raise RuntimeError("a second backward pass of token_losses: compute the loss again")
        # Where no loss is, logits that overflowed in 16 bits must not become 0 times infinity.
        d_logits.masked_fill_(~under_loss.unsqueeze(1), 0)
        gradient = gradients[0].masked_fill(~under_loss, 0).unsqueeze(1)
        d_logits.mul_(gradient).scatter_add_(1, index, -gradient)
        return d_logits.to(ctx.dtype), None


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of -log p(label) in nats over the positions under the loss, in fp32.

    Shapes: logits (..., V); labels (...), already shifted, IGNORE_INDEX where no loss.
    """
    return token_losses(logits, labels).sum()


def sequence_log_probs(
    logits: Tensor, labels: Tensor, document_ids: Tensor, num_documents: int
) -> Tensor:
    """Return the log-probability of each document's supervised tokens, in nats.

    Shapes: logits (..., V); labels, document_ids (...) -> (C,) with C = num_documents; padding
    has document ids from num_documents on and is omitted.
    """
    # One more slot gathers what belongs to no document.
    slots = document_ids.flatten().clamp(max=num_documents)
    losses = token_losses(logits, labels)
    return losses.new_zeros(num_documents + 1).index_add(0, slots, -losses)[:num_documents]


def batch_log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """Return the log-probability of each document's supervised tokens, in nats; shape (C,)."""
    logits = model(**batch.inputs)
    labels, documents = batch.selected(batch.labels), batch.selected(batch.document_ids)
    return sequence_log_probs(logits, labels, documents, len(batch.sequence_ids))
