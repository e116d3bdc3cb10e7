"""Plan for an epoch: which units share a row, and the order of the rows."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from trainlib.core.errors import UserError
from trainlib.core.files import DAMAGED, cache_dir, read_meta, record_files, replacing, write_json

log = logging.getLogger(__name__)

PLAN_LAYOUT = 1  # Increase this when the packing of the same data changes.
MAX_PLANS = 20
Row = np.ndarray  # The indices of the units that share a row.


class DataPosition(NamedTuple):
    """Epoch and row of the next row to read, counted from 0."""

    epoch: int = 0
    row: int = 0


@dataclass(frozen=True)
class EpochPlan:
    """The rows of an epoch; row i is units[bounds[order[i]] : bounds[order[i] + 1]]."""

    units: np.ndarray
    bounds: np.ndarray
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> Row:
        row = self.order[number]
        return np.asarray(self.units[self.bounds[row] : self.bounds[row + 1]])

    @classmethod
    def load_or_build(cls, key: str, build: Callable[[], EpochPlan]) -> EpochPlan:
        """Return the memory-mapped plan for `key` from .cache/plans; build it if it is missing."""
        folder = cache_dir() / "plans"
        meta = folder / f"{key}.json"
        names = [f"{key}.{field.name}.npy" for field in fields(cls)]
        try:
            try:
                read_meta(meta, verify=True)
            except DAMAGED as error:
                if meta.exists():
                    log.warning("%s is damaged and is rebuilt: %s", meta, error)
                folder.mkdir(parents=True, exist_ok=True)
                for old in sorted(folder.glob("*.*"), key=os.path.getmtime)[: -4 * MAX_PLANS]:
                    old.unlink(missing_ok=True)
                plan = build()
                for field, name in zip(fields(cls), names, strict=True):
                    with replacing(folder / name) as temporary:
                        np.save(temporary, getattr(plan, field.name))
                write_json(meta, {"files": record_files(folder, names)})
            return cls(*(np.load(folder / name, mmap_mode="r") for name in names))
        except OSError as error:
            raise UserError(
                f"{folder}: {error.strerror or error}. The order of the data is stored there. "
                "Set TRAIN_LLM_CACHE_DIR to another folder."
            ) from error
