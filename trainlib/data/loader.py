"""Loader that groups rows into optimizer steps and micro-batches."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from trainlib.core.distributed import SINGLE_PROCESS, DistributedContext
from trainlib.data.batch import Batch
from trainlib.data.epoch_plan import DataPosition, Row
from trainlib.data.packing import PackedDataset


@dataclass(frozen=True)
class StepBatch:
    """Data for one optimizer step: micro-batches of this process, and counts over all processes."""

    micro_batches: list[Batch]
    num_targets: int
    num_tokens: int
    after: DataPosition


def micro_batch_shape(rows_per_step: int, micro_batch_size: int,
                      world_size: int) -> tuple[int, int]:  # fmt: skip
    """Return (micro-batches per process, rows per micro-batch) for a step, minimizing the first."""
    num_micro = -(-rows_per_step // (max(1, micro_batch_size) * world_size))
    return num_micro, -(-rows_per_step // (num_micro * world_size))


class StepLoader:
    """Iterator over the data for optimizer steps; a thread prefetches the next step.

    A step reads tokens_per_step / row_length rows, independent of the world size. The rows are
    spread evenly over as few micro-batches of at most micro_batch_size rows as possible, the same
    number on each process. All micro-batches have the same shape; missing rows are empty. A step
    may span two epochs, but if `epochs` is set, the last step ends at the last row. `pin` pins the
    micro-batches, since a copy from pageable memory would wait for all work queued on the GPU.
    """

    def __init__(self, dataset: PackedDataset, tokens_per_step: int, micro_batch_size: int,
                 epochs: int = 0, distributed: DistributedContext = SINGLE_PROCESS,
                 pin: bool = False) -> None:  # fmt: skip
        self.dataset, self.epochs, self.distributed, self.pin = dataset, epochs, distributed, pin
        self.rows_per_step = max(1, tokens_per_step // dataset.row_length)
        _, self.micro_batch_rows = micro_batch_shape(
            self.rows_per_step, micro_batch_size, distributed.world_size
        )
        self.position = DataPosition()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._next: Future[StepBatch] | None = None

    def num_steps(self) -> int:
        """Return the number of steps in `epochs` epochs."""
        rows = sum(self.dataset.num_rows(epoch) for epoch in range(self.epochs))
        return -(-rows // self.rows_per_step)

    def seek(self, position: DataPosition) -> None:
        """Continue reading from a position."""
        self.position, self._next = position, None

    def __next__(self) -> StepBatch:
        """Return the next step and advance the position, which prefetching does not change."""
        batch = self._next.result() if self._next else self._make(self.position)
        self.position = batch.after
        self._next = self._thread.submit(self._make, batch.after)
        return batch

    def _make(self, position: DataPosition) -> StepBatch:
        rows: list[Row] = []
        while left := self.rows_per_step - len(rows):
            if self.epochs and rows and position.epoch >= self.epochs:
                break
            if position.row >= self.dataset.num_rows(position.epoch):
                # This position is beyond the end: it comes from a run on other data.
                position = DataPosition(position.epoch + 1)
            for row, after in islice(self.dataset.rows(position), left):
                rows.append(row)
                position = after
        count = self.distributed.world_size
        num_micro = -(-len(rows) // (self.micro_batch_rows * count))
        # Row i goes to micro-batch i mod n, so that all are filled evenly; every process takes the
        # same number of the n micro-batches.
        micro = [self.dataset.collate(rows[i :: num_micro * count], self.micro_batch_rows)
                 for i in range(self.distributed.rank, num_micro * count, count)]  # fmt: skip
        if self.pin:
            micro = [batch.pin_memory() for batch in micro]
        num_targets, num_tokens = self.dataset.count(rows)
        return StepBatch(micro, num_targets, num_tokens, position)
