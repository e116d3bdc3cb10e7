"""Rows to optimizer steps: how many rows a step takes and how they are dealt to micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from trainlib.core.distributed import Ranks

BatchT = TypeVar("BatchT")
MadeT = TypeVar("MadeT", covariant=True)
ALONE = Ranks()


class Place(NamedTuple):
    """Epoch and row of a data set, counted from 0: the next row to be read."""

    epoch: int = 0
    row: int = 0


class Dataset(Protocol[MadeT]):
    """What a data set offers (dataset.PackedDataset is one)."""

    row_length: int

    def rows(self, position: Place) -> Iterator[tuple[Any, Place]]:
        """Rows from a position to the end of its epoch, each with the position after it."""
        ...

    def num_rows(self, epoch: int = 0) -> int:
        """Rows of an epoch."""
        ...

    def collate(self, rows: list[Any], num_rows: int) -> MadeT:
        """One micro-batch of num_rows rows, empty ones at the end."""
        ...

    def count(self, rows: list[Any]) -> tuple[int, int]:
        """Targets (what a loss is divided by) and real positions of some rows."""
        ...


@dataclass(frozen=True)
class StepBatch(Generic[BatchT]):
    """What one optimizer step reads: this rank's micro-batches, and counts of the whole step."""

    micro_batches: list[BatchT]
    num_targets: int
    num_tokens: int
    after: Place


def deal(rows_per_step: int, micro_batch_size: int, num_ranks: int) -> tuple[int, int]:
    """As few micro-batches of each rank as hold a step's rows, and the rows of each of them."""
    num_micro = -(-rows_per_step // (max(1, micro_batch_size) * num_ranks))
    return num_micro, -(-rows_per_step // (num_micro * num_ranks))


class StepLoader(Generic[BatchT]):
    """Deals a data set's rows to optimizer steps, the next one made in a thread meanwhile.

    A step takes tokens_per_step / row_length rows, whatever the number of ranks, dealt evenly to
    as few micro-batches of at most micro_batch_size rows as hold them, the same number for each
    rank; all have one shape, and rows that are missing are empty. Goes on into the next epoch;
    with `epochs` the last step ends with the last row. `pin` puts micro-batches into pinned
    memory: from other memory a copy to a card waits for all that the card has yet to do.
    """

    def __init__(
        self,
        dataset: Dataset[BatchT],
        tokens_per_step: int,
        micro_batch_size: int,
        epochs: int = 0,
        ranks: Ranks = ALONE,
        pin: bool = False,
    ) -> None:
        self.dataset, self.epochs, self.ranks = dataset, epochs, ranks
        self.pin = pin
        self.rows_per_step = max(1, tokens_per_step // dataset.row_length)
        _, self.micro_batch_rows = deal(self.rows_per_step, micro_batch_size, ranks.count)
        self.position = Place()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._next: Future[StepBatch[BatchT]] | None = None

    def num_steps(self) -> int:
        """Steps of `epochs` epochs."""
        rows = sum(self.dataset.num_rows(epoch) for epoch in range(self.epochs))
        return -(-rows // self.rows_per_step)

    def seek(self, position: Place) -> None:
        """Read on from a position."""
        self.position, self._next = position, None

    def __next__(self) -> StepBatch[BatchT]:
        """The next step; the position moves only when it is handed out, not when prefetched."""
        batch = self._next.result() if self._next else self._make(self.position)
        self.position = batch.after
        self._next = self._thread.submit(self._make, batch.after)
        return batch

    def _make(self, position: Place) -> StepBatch[BatchT]:
        rows: list[Any] = []
        while len(rows) < self.rows_per_step and (
            not self.epochs or not rows or position.epoch < self.epochs
        ):
            if position.row >= self.dataset.num_rows(position.epoch):
                # A place beyond the end, which a run on other data left behind.
                position = Place(position.epoch + 1)
            for row, after in self.dataset.rows(position):
                rows.append(row)
                position = after
                if len(rows) == self.rows_per_step:
                    break
        count = self.ranks.count
        num_micro = -(-len(rows) // (self.micro_batch_rows * count))
        # Row i goes to micro-batch i mod n, so that all are filled alike; of these n, every rank
        # takes as many, itself first.
        micro: list[Any] = [
            self.dataset.collate(rows[i :: num_micro * count], self.micro_batch_rows)
            for i in range(self.ranks.rank, num_micro * count, count)
        ]
        if self.pin:
            micro = [batch.pinned() for batch in micro]
        num_targets, num_tokens = self.dataset.count(rows)
        return StepBatch(micro, num_targets, num_tokens, position)
