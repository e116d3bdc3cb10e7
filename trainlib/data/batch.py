"""A micro-batch: the tensors that the model and the losses read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch; tensors are (B, T), except boundaries and sequence_ids (C,).

    boundaries (int32) holds the document boundaries in the flattened rows, padded by repeating the
    last one. document_ids number the documents in the micro-batch, in the order of sequence_ids;
    padding has ids starting at C. In preference data, documents 2p and 2p + 1 are the chosen and
    rejected answers of pair p. num_targets is the divisor of the loss: the number of labels, or of
    pairs. num_bytes is the number of bytes in the text of the labels.
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
        """Return a mask of the positions with a label; None on a GPU, where shapes must be static.

        On a CPU, the output layer is half of a small model's work; many positions have no label.
        """
        return self.labels != IGNORE_INDEX if self.labels.device.type == "cpu" else None

    def selected(self, values: Tensor) -> Tensor:
        """Return the entries of `values` (labels or document_ids) that correspond to the logits."""
        select = self.select
        return values if select is None else values[select]

    @property
    def inputs(self) -> dict[str, Tensor | None]:
        """Return the keyword arguments for the model."""
        names = ("input_ids", "position_ids", "document_ids", "boundaries", "select")
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; copies from pinned memory are asynchronous."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {k: function(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)
