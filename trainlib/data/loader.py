"""Rows to optimizer steps: how many rows a step takes, and which micro-batch each is in."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from trainlib.core.distributed import SINGLE_PROCESS, DistributedContext
from trainlib.data.batch import Batch
from trainlib.data.epoch_plan import DataPosition, Row
from trainlib.data.packing import PackedDataset


@dataclass(frozen=True)
class StepBatch:
    """What one optimizer step reads: micro-batches of this process, and counts of the step."""

    micro_batches: list[Batch]
    num_targets: int
    num_tokens: int
    after: DataPosition


def micro_batch_shape(
    rows_per_step: int, micro_batch_size: int, world_size: int
) -> tuple[int, int]:
    """Return (micro-batches per process, rows per micro-batch) of a step, as few as possible."""
    num_micro = -(-rows_per_step // (max(1, micro_batch_size) * world_size))
    return num_micro, -(-rows_per_step // (num_micro * world_size))


class StepLoader:
    """Yield the batches of optimizer steps; a thread makes the next one meanwhile.

    A step takes tokens_per_step / row_length rows, whatever the number of processes, spread evenly
    over as few micro-batches of at most micro_batch_size rows as possible, the same number for
    each process; all have one shape, and missing rows are empty. Continues into the next epoch;
    with `epochs` the last step ends with the last row. `pin` puts micro-batches into pinned
    memory: a copy from other memory waits until the card has done all its work.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        tokens_per_step: int,
        micro_batch_size: int,
        epochs: int = 0,
        distributed: DistributedContext = SINGLE_PROCESS,
        pin: bool = False,
    ) -> None:
        self.dataset, self.epochs, self.distributed = dataset, epochs, distributed
        self.pin = pin
        self.rows_per_step = max(1, tokens_per_step // dataset.row_length)
        _, self.micro_batch_rows = micro_batch_shape(
            self.rows_per_step, micro_batch_size, distributed.world_size
        )
        self.position = DataPosition()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._next: Future[StepBatch] | None = None

    def num_steps(self) -> int:
        """Return the number of steps of `epochs` epochs."""
        rows = sum(self.dataset.num_rows(epoch) for epoch in range(self.epochs))
        return -(-rows // self.rows_per_step)

    def seek(self, position: DataPosition) -> None:
        """Continue from a position."""
        self.position, self._next = position, None

    def __next__(self) -> StepBatch:
        """Return the next step; the position moves now, not when the step was prefetched."""
        batch = self._next.result() if self._next else self._make(self.position)
        self.position = batch.after
        self._next = self._thread.submit(self._make, batch.after)
        return batch

    def _make(self, position: DataPosition) -> StepBatch:
        rows: list[Row] = []
        while len(rows) < self.rows_per_step and (
            not self.epochs or not rows or position.epoch < self.epochs
        ):
            if position.row >= self.dataset.num_rows(position.epoch):
                # A position beyond the end, from a run on other data.
                position = DataPosition(position.epoch + 1)
            for row, after in self.dataset.rows(position):
                rows.append(row)
                position = after
                if len(rows) == self.rows_per_step:
                    break
        count = self.distributed.world_size
        num_micro = -(-len(rows) // (self.micro_batch_rows * count))
        # Row i goes to micro-batch i mod n, so that all are filled alike; every process takes the
        # same number of these n.
        micro = [
            self.dataset.collate(rows[i :: num_micro * count], self.micro_batch_rows)
            for i in range(self.distributed.rank, num_micro * count, count)
        ]
        if self.pin:
            micro = [batch.pin_memory() for batch in micro]
        num_targets, num_tokens = self.dataset.count(rows)
        return StepBatch(micro, num_targets, num_tokens, position)
