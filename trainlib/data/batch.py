"""A micro-batch: the tensors that the model and the losses read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch; tensors are (B, T) but for boundaries and sequence_ids (C,).

    boundaries (int32) are the starts and ends of documents in the flattened rows; the last one is
    repeated. document_ids count through the whole micro-batch, one for each of sequence_ids;
    padding has ids from C on. Document 2p is the chosen answer of preference pair p, 2p + 1 the
    rejected one. num_targets is the divisor of the loss: labels under the loss, or pairs.
    num_bytes counts the text of the labels.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    document_ids: Tensor
    boundaries: Tensor
    sequence_ids: Tensor
    num_targets: int
    num_bytes: int
    num_tokens: int

    @property
    def select(self) -> Tensor | None:
        """Return a mask of the positions with a label; None on a GPU, where shapes must not vary.

        On a CPU the output matrix is half of a small model's work, and a third of a conversation
        has no label.
        """
        return self.labels != IGNORE_INDEX if self.labels.device.type == "cpu" else None

    def selected(self, values: Tensor) -> Tensor:
        """Return labels or document_ids in the order of the model's logits."""
        select = self.select
        return values if select is None else values[select]

    @property
    def inputs(self) -> dict[str, Tensor | None]:
        """Return the keyword arguments of the model."""
        return {
            "select": self.select,
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "document_ids": self.document_ids,
            "boundaries": self.boundaries,
        }

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; the copy from pinned memory is asynchronous."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)
