"""One micro-batch, and what of it the model and the losses take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch; shapes (B, T) except sequence_ids (C,), one an entry of document_ids.

    boundaries are where documents begin and end in the rows laid end to end, int32, the last one
    repeated. document_ids count through the whole micro-batch; padding has ids from C on. Of a
    preference pair p, document 2p is chosen and 2p + 1 rejected. num_targets is what a step's loss
    is divided by: labels under the loss, or pairs. num_bytes counts the text behind the labels.
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
        """Where labels are; None on a card, where shapes must not vary.

        On a CPU the output matrix is half of a small model's work, and of a conversation a third
        has no label.
        """
        return self.labels != IGNORE_INDEX if self.labels.device.type == "cpu" else None

    def selected(self, values: Tensor) -> Tensor:
        """Labels or document_ids in the order of the model's logits."""
        select = self.select
        return values if select is None else values[select]

    @property
    def inputs(self) -> dict[str, Tensor | None]:
        """The model's keywords."""
        return {
            "select": self.select,
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "document_ids": self.document_ids,
            "boundaries": self.boundaries,
        }

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; from pinned memory without waiting for it."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pinned(self) -> Batch:
        """The same batch in memory that a card reads by itself."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)
