"""Best-fit packing of documents into rows of equal length, and collation of rows into batches.

Invariants of every Batch: documents in a row never attend to each other (document_ids), positions
restart with each document, a label is the next id, and padding is a document without labels. Only
collate shifts labels by one.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from trainlib.core.errors import UserError
from trainlib.data.batch import IGNORE_INDEX, Batch
from trainlib.data.epoch_plan import PLAN_LAYOUT, DataPosition, EpochPlan, Row
from trainlib.data.token_cache import TokenCache

Part = tuple[TokenCache, np.ndarray]  # A token cache and a mask of the records to use.
Origin = tuple[TokenCache, int]  # A token cache and the number of a record in it.
WINDOW = 8192  # Number of units packed at a time: the cost is linear, and units stay shuffled.
FEW_ROWS = 30  # Figures for fewer rows are reported as meaning little, without a standard error.
STORED_UNITS = 500_000  # From this many units on, a plan takes seconds, so it is cached on disk.


class PackedDataset:
    """Documents packed into rows of `row_length` positions.

    A unit is a piece of a document, a conversation, or both answers in a pair; it is never split.
    Documents longer than a row are split into pieces (pretraining). Longer conversations and pairs
    are truncated or dropped (see `usable_lengths`), and counted by source. Sequence ids of the
    selected records start at `first_sequence_id`.

    `repeats` is how many times an epoch reads each part, at least 1. If it is fractional, the next
    epoch continues where this one stopped, so all units of a part are used equally often.
    """

    def __init__(self, parts: list[Part], kind: str, row_length: int, byte_lengths: np.ndarray,
                 seed: int, *, first_sequence_id: int = 0, max_rows: int = 0,
                 too_long: str = "drop", repeats: list[float] | None = None) -> None:  # fmt: skip
        self.parts, self.caches = parts, [cache for cache, _ in parts]
        self.kind, self.row_length, self.seed, self.max_rows = kind, row_length, seed, max_rows
        self.first_sequence_id = first_sequence_id
        self.num_dropped: Counter[str] = Counter()
        self.num_cut: Counter[str] = Counter()
        self._repeats, self._byte_lengths = repeats, byte_lengths
        self._per_record = 2 if kind == "dpo" else 1  # Sequences per record.
        self._plans: dict[int, EpochPlan] = {}
        units: list[list[np.ndarray]] = []
        full_lengths: list[np.ndarray] = []
        count = first_sequence_id
        for number, (cache, selected) in enumerate(parts):
            index = np.flatnonzero(selected)
            lengths = usable_lengths(cache, index, kind, row_length, too_long)
            units.append(self._units_of(number, cache, index, count, *lengths))
            full_lengths.append(lengths[0])
            count += len(index) * self._per_record
        self.num_sequences = count - first_sequence_id
        self.num_records = self.num_sequences // self._per_record
        self.num_used = self.num_records - self.num_dropped.total()  # Without dropped records.
        longest = np.sort(np.concatenate(full_lengths))[: -(-99 * self.num_records // 100)]
        self.length_of_99_percent = int(longest[-1]) if len(longest) else 0
        self._file, self._start, self._length, self._id, self._record = (
            a[0] if len(a) == 1 else np.concatenate(a) for a in zip(*units, strict=True)
        )
        self.num_units = len(self._length)  # Number of pieces, conversations or pairs.
        if not self.num_units:
            names = ", ".join(str(cache.path) for cache in self.caches)
            if dropped := self.num_dropped.total():
                raise UserError(none_fits(names, dropped, row_length))
            raise UserError(f"{names}: no usable rows. Run python -m tools.inspect_data on it.")

    def _units_of(self, number: int, cache: TokenCache, index: np.ndarray, first_id: int,
                  length: np.ndarray, usable: np.ndarray) -> list[np.ndarray]:  # fmt: skip
        """Return file, start, length, sequence id and record of each unit in records `index`."""
        # Values take 32 bits where possible: the units of 5 GB of text take 92 MB.
        start = cache.offsets[index * self._per_record]
        ids = (first_id + np.arange(len(index)) * self._per_record).astype(np.int32)
        index = index.astype(np.int32)
        if self.kind == "pretrain":
            pieces = -(-length // self.row_length)
            owner = np.repeat(np.arange(len(index), dtype=np.int32), pieces)
            before = (pieces.cumsum() - pieces).astype(np.int32)
            offset = np.arange(len(owner), dtype=np.int32) - before[owner]
            offset *= self.row_length
            start = start[owner]
            start += offset
            length = np.minimum(length[owner] - offset, self.row_length)
            ids, index = ids[owner], index[owner]
        else:
            fits = usable > 0
            for counts, records in ((self.num_dropped, index[~fits]),
                                    (self.num_cut, index[fits & (usable < length)])):  # fmt: skip
                counts.update(cache.source(record) or cache.path.stem for record in records)
            start, length, ids, index = start[fits], usable[fits], ids[fits], index[fits]
        return [np.full(len(start), number, np.int32), start, length, ids, index]

    @property
    def num_tokens(self) -> int:
        """Return the number of positions in one epoch, without padding."""
        if self._repeats is None:
            return int(self._length.sum(dtype=np.int64))
        sums = np.bincount(self._file, self._length, len(self._repeats))
        return round(float(sums @ np.array(self._repeats)))

    def mean_context_length(self) -> float:
        """Return how many positions one attends to on average, if answers have equal length."""
        counts = np.bincount(self._length)  # Indexed by length.
        lengths = np.arange(len(counts)) / self._per_record
        return float(counts @ (lengths * (lengths + 1) / 2) / (counts @ lengths))

    def num_rows(self, epoch: int = 0) -> int:
        """Return the number of rows in an epoch."""
        return len(self._plan(epoch))

    def padding_fraction(self, epoch: int = 0) -> float:
        """Return the fraction of an epoch's positions that are padding."""
        plan = self._plan(epoch)
        sizes = np.add.reduceat(self._length[plan.units], plan.bounds[:-1], dtype=np.int64)
        return float(1 - sizes[plan.order].sum() / (len(plan) * self.row_length))

    def rows(self, position: DataPosition) -> Iterator[tuple[Row, DataPosition]]:
        """Yield the rows from a position to the end of its epoch, each with the next position."""
        plan = self._plan(position.epoch)
        for number in range(position.row, len(plan)):
            epochs, row = divmod(number + 1, len(plan))
            yield plan[number], DataPosition(position.epoch + epochs, row)

    @property
    def selection(self) -> bytes:
        """Return the ids of the selected sequences, as bytes to hash."""
        return self._id.tobytes()

    def origins(self) -> dict[int, Origin]:
        """Return the origin of every unit, keyed by the id of its (first) sequence."""
        return {int(i): (self.caches[f], int(r))
                for i, f, r in zip(self._id, self._file, self._record, strict=True)}  # fmt: skip

    def _plan(self, epoch: int) -> EpochPlan:
        plan = self._plans.get(epoch)
        if plan is None and self.num_units < STORED_UNITS:
            plan = self._pack(epoch)
        elif plan is None:
            recipe = [self.seed, epoch, self.row_length, self.max_rows, self._repeats, PLAN_LAYOUT]
            content = self._length.tobytes() + self._file.tobytes() + repr(recipe).encode()
            key = hashlib.blake2b(content, digest_size=8).hexdigest()
            plan = EpochPlan.load_or_build(key, lambda: self._pack(epoch))
        self._plans = {epoch: plan}  # Keep one epoch only; the loader's thread reads it too.
        return plan

    def _pack(self, epoch: int) -> EpochPlan:
        rng = np.random.default_rng([self.seed, epoch])
        units = rng.permutation(self._units(epoch))
        full = self._length[units] == self.row_length
        shorter = units[~full]
        packed, sizes = [units[full]], [np.ones(int(full.sum()), np.int64)]
        for begin in range(0, len(shorter), WINDOW):
            part = shorter[begin : begin + WINDOW]
            rows = pack_best_fit(self._length[part], self.row_length)
            packed.append(part[np.concatenate(rows)])
            sizes.append(np.array([len(row) for row in rows]))
        bounds = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
        order = rng.permutation(len(bounds) - 1).astype(np.int32)
        return EpochPlan(np.concatenate(packed), bounds, order[: self.max_rows or None])

    def _units(self, epoch: int) -> np.ndarray:
        """Return the units in an epoch; units of a repeated part occur several times."""
        if self._repeats is None:
            return np.arange(self.num_units, dtype=np.int32)
        chosen, first = [], 0
        sizes = np.bincount(self._file, minlength=len(self._repeats)).tolist()
        for part, (repeats, size) in enumerate(zip(self._repeats, sizes, strict=True)):
            # Repeated shuffles form an endless stream; each epoch reads the next `count` units.
            count = round(repeats * size)
            begin, end = epoch * count, (epoch + 1) * count
            for number in range(begin // size, -(-end // size)) if count else ():
                shuffled = np.random.default_rng([self.seed, part, number, 1]).permutation(size)
                span = slice(max(0, begin - number * size), min(size, end - number * size))
                chosen.append(first + shuffled[span])
            first += size
        return np.concatenate(chosen).astype(np.int32)

    def collate(self, rows: list[Row], num_rows: int) -> Batch:
        """Collate rows into one batch, padded with empty rows to `num_rows`.

        Example: two documents, ids 0 7 8 0 and 0 9 0, in a row of six positions:

            input_ids      0 7 8 | 0 9 | 0          position_ids   0 1 2 | 0 1 | 0
            labels         7 8 0 | 9 0 | -100       document_ids   0 0 0 | 1 1 | 2   (padding: 2)
        """
        shape = (num_rows, self.row_length)
        input_ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORE_INDEX, np.int64)
        documents = np.full(shape, -1, np.int64)
        sequence_ids: list[int] = []
        for r, row in enumerate(rows):
            column = 0
            for unit in row:
                for part, (ids, supervised) in enumerate(self._sequences(unit)):
                    size = len(ids) - 1
                    span = slice(column, column + size)
                    input_ids[r, span] = ids[:-1]
                    labels[r, span] = np.where(supervised[1:], ids[1:], IGNORE_INDEX)
                    positions[r, span] = np.arange(size)
                    documents[r, span] = len(sequence_ids)
                    sequence_ids.append(int(self._id[unit]) + part)
                    column += size
        empty = documents < 0
        documents[empty] = len(sequence_ids) + np.nonzero(empty)[0]
        under_loss = labels != IGNORE_INDEX
        flat = documents.reshape(-1)
        edges = np.flatnonzero(np.diff(flat)) + 1
        # A power of two, enough for 32-token documents, so that a compiled model sees few shapes.
        size = 1 << max(len(edges) + 1, len(flat) // 32).bit_length()
        boundaries = np.full(size, len(flat), np.int32)
        boundaries[0], boundaries[1 : len(edges) + 1] = 0, edges
        tensors = map(torch.from_numpy, (input_ids, labels, positions, documents, boundaries))
        num_targets = len(sequence_ids) // 2 if self.kind == "dpo" else int(under_loss.sum())
        num_bytes = int(self._byte_lengths[labels[under_loss]].sum())
        return Batch(*tensors, sequence_ids=torch.tensor(sequence_ids, dtype=torch.int64),
                     num_targets=num_targets, num_bytes=num_bytes,
                     num_tokens=int((~empty).sum()))  # fmt: skip

    def count(self, rows: list[Row]) -> tuple[int, int]:
        """Return the number of targets (labels or preference pairs) and positions in rows."""
        units = [unit for row in rows for unit in row]
        num_tokens = int(self._length[units].sum())
        if self.kind == "dpo":
            return len(units), num_tokens
        if self.kind == "pretrain":
            return num_tokens, num_tokens  # Every id but a document's first is a label.
        sequences = (sequence for unit in units for sequence in self._sequences(unit))
        return sum(int(supervised[1:].sum()) for _, supervised in sequences), num_tokens

    def _sequences(self, unit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        cache, start = self.caches[self._file[unit]], int(self._start[unit])
        if self.kind == "dpo":
            first = 2 * int(self._record[unit])
            bounds = [int(cache.offsets[first + i]) for i in range(3)]
        else:
            bounds = [start, start + int(self._length[unit]) + 1]
        for begin, end in zip(bounds, bounds[1:], strict=False):
            yield cache.ids[begin:end].astype(np.int64), cache.supervised[begin:end] != 0


def usable_lengths(cache: TokenCache, index: np.ndarray, kind: str, row_length: int,
                   too_long: str) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return the length of each record in `index`, in positions, and its first part to be used.

    Documents are used entirely (pretraining). A conversation longer than a row is used up to the
    last answer that fits, or, if none fits, as far as the row goes (too_long="cut"). The used part
    is 0 if it would have no target, and for other records longer than a row.
    """
    per_record = 2 if kind == "dpo" else 1
    start, end = (cache.offsets[(index + i) * per_record] for i in (0, 1))
    length = end - start - per_record  # The last id of a sequence is only a label.
    if (longest := length.max(initial=0)) > np.iinfo(np.int32).max:
        raise UserError(f"{cache.path}: a row has {longest:,} tokens. Split it.")
    length = length.astype(np.int32)
    if kind == "pretrain":
        return length, length
    usable = np.where(length <= row_length, length, np.int32(0))
    if kind == "sft" and too_long == "cut":
        for i in np.flatnonzero(length > row_length):
            mask = cache.supervised[start[i] : start[i] + row_length + 2]
            targets = np.flatnonzero(mask[1:-1]) + 1
            ends = targets[mask[targets + 1] == 0]  # The end-of-turn tokens.
            if len(targets):
                usable[i] = ends[-1] if len(ends) else targets[-1]
    return length, usable


def none_fits(names: str, num_rows: int, row_length: int) -> str:
    """Return the error message for files whose rows are all too long."""
    where = f"{names}: none of {num_rows} rows fits in {row_length} positions"
    return f"{where}. Increase sequence_length."


def pack_best_fit(lengths: np.ndarray, row_length: int) -> list[list[int]]:
    """Assign units to rows, longest first, each to the fullest row that it fits in.

    Example: lengths 5 3 2 2, rows of 6 -> [0], [1, 2], [3].
    """
    rows: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(row_length + 1)]
    spaces = 0  # Bit s is set if some row has s positions left.
    sizes = lengths.tolist()
    for unit in np.argsort(-lengths, kind="stable").tolist():
        size = sizes[unit]
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                spaces &= ~(1 << space)
        else:
            space, row = row_length, len(rows)
            rows.append([])
        rows[row].append(unit)
        with_space[space - size].append(row)
        spaces |= 1 << (space - size)
    return rows


class Datasets(NamedTuple):
    """Training data, validation data by name, and a key that identifies both."""

    train: PackedDataset
    val: dict[str, PackedDataset]
    data_key: str  # Changes when the rows of a file, the tokenizer or the choice of files change.
    baselines: dict[str, float] = {}  # Model-free bits per byte, by name; none for preferences.

    def with_val_rows(self, max_rows: int) -> Datasets:
        """Return the same data with up to `max_rows` rows of each validation set; 0 = all."""
        val = {name: copy.copy(packed) for name, packed in self.val.items()}
        for packed in val.values():
            packed.max_rows, packed._plans = max_rows, {}
        return self._replace(val=val)
