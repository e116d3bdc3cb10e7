"""Losses and log-probabilities as functions of logits, which they do not modify.

Losses are sums. The training step divides once, by the number of targets in the step, so
micro-batches are weighted by their number of targets.

Shapes: B rows, T positions, V vocab_size, C documents in a micro-batch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainlib.data.batch import IGNORE_INDEX, Batch


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log p(label) at each position in nats, in fp32; 0 where the label is IGNORE_INDEX.

    Equals F.cross_entropy with reduction="none" on fp32 logits, with fewer passes over the largest
    tensor in a step. Ignored positions get zero gradient, even if their 16-bit logits overflowed.
    Shapes: logits (..., V), labels (...) -> (N,), with all positions flattened.
    """
    return TokenLossFunction.apply(logits.flatten(0, -2), labels.flatten())


class TokenLossFunction(torch.autograd.Function):
    """Cross-entropy that saves the probabilities and converts them to the gradient in place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        supervised = labels != IGNORE_INDEX
        index = labels.masked_fill(~supervised, 0).unsqueeze(1)
        below_max = logits.amax(1).to(dtype) - logits.gather(1, index).squeeze(1).to(dtype)
        probabilities = torch.empty_like(logits, dtype=dtype)
        # Without `out`, 16-bit logits would be converted to a second fp32 tensor.
        torch.softmax(logits, 1, dtype=dtype, out=probabilities)
        # The largest logit has probability exp(0) / sum, so the sum needs no second pass. A label's
        # own probability may be 0, so its logarithm is never taken.
        losses = below_max - probabilities.amax(1).log()
        ctx.dtype = logits.dtype
        ctx.probabilities = probabilities
        ctx.save_for_backward(supervised, index)
        return losses.masked_fill(~supervised, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return p - 1 at the label and p elsewhere, times the gradient of the loss."""
        supervised, index = ctx.saved_tensors
        d_logits, ctx.probabilities = ctx.probabilities, None
        if d_logits is None:
            raise RuntimeError("second backward pass through token_losses: recompute the loss")
        # At ignored positions, 16-bit logits that overflowed must not become 0 times infinity.
        d_logits.masked_fill_(~supervised.unsqueeze(1), 0)
        gradient = gradients[0].masked_fill(~supervised, 0).unsqueeze(1)
        d_logits.mul_(gradient).scatter_add_(1, index, -gradient)
        return d_logits.to(ctx.dtype), None


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the token losses, a scalar; the labels are already shifted."""
    return token_losses(logits, labels).sum()


def sequence_log_probs(logits: Tensor, labels: Tensor, document_ids: Tensor,
                       num_documents: int) -> Tensor:  # fmt: skip
    """Return the total log-probability in nats of the supervised tokens in each document.

    Shapes: logits (..., V); labels, document_ids (...) -> (C,). Padding has ids from C on.
    """
    # An extra slot collects the padding.
    slots = document_ids.flatten().clamp(max=num_documents)
    losses = token_losses(logits, labels)
    return losses.new_zeros(num_documents + 1).index_add(0, slots, -losses)[:num_documents]


def batch_log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """Return the total log-probability in nats of the supervised tokens per document, (C,)."""
    logits = model(**batch.inputs)
    labels, documents = batch.selected(batch.labels), batch.selected(batch.document_ids)
    return sequence_log_probs(logits, labels, documents, len(batch.sequence_ids))
