"""Plan for an epoch: which units share a row, and the order of the rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from trainlib.core.errors import UserError
from trainlib.core.files import cache_dir, replacing

PLAN_LAYOUT = 1
"""Increase this when the packing of the same data changes."""
MAX_PLANS = 20
Row = np.ndarray
"""The indices of the units that share a row."""


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
        paths = {f.name: folder / f"{key}.{f.name}.npy" for f in fields(cls)}
        try:
            if not all(path.is_file() for path in paths.values()):
                folder.mkdir(parents=True, exist_ok=True)
                for old in sorted(folder.glob("*.npy"), key=os.path.getmtime)[: -3 * MAX_PLANS]:
                    old.unlink(missing_ok=True)
                plan = build()
                for name, path in paths.items():
                    with replacing(path) as temporary:
                        np.save(temporary, getattr(plan, name))
            return cls(*(np.load(path, mmap_mode="r") for path in paths.values()))
        except OSError as error:
            raise UserError(
                f"{folder}: {error.strerror or error}. The order of the data is stored there. "
                "Set TRAIN_LLM_CACHE_DIR to another folder."
            ) from error
