"""The two losses' ingredients: pure functions of logits, nothing else.

Everything is a sum; the training loop divides once, by the targets of the whole step. So a
micro-batch with few targets never weighs as much as one with many.

Shapes: B rows, T positions, V vocab_size, C documents of a micro-batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p(label) in nats over the positions under the loss, in fp32.

    Shapes: logits (..., V); labels (...), already shifted, IGNORE_INDEX where no loss.
    """
    return F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def sequence_log_probs(
    logits: Tensor, labels: Tensor, document_ids: Tensor, num_documents: int
) -> Tensor:
    """Log-probability of each document's supervised tokens, in nats.

    Shapes: logits (..., V); labels, document_ids (...) -> (C,) with C = num_documents; padding
    has document ids from num_documents on and is left out.
    """
    token_log_probs = -F.cross_entropy(
        logits.flatten(0, -2).float(),
        labels.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    # One slot more gathers what belongs to no document.
    slots = document_ids.flatten().clamp(max=num_documents)
    sums = torch.zeros(num_documents + 1, device=logits.device)
    return sums.index_add(0, slots, token_log_probs)[:num_documents]
