"""Protects the micro batches of configs/hardware.tsv: the memory that they are said to take.

The default model's whole step is run on tensors without content, and what they would take is
counted.
"""

from __future__ import annotations

import pytest

from model import ModelConfig, Transformer
from tests.docker.test_choice import table
from tests.test_plan import make_step
from trainlib.memory import CUDA_BYTES, peak_bytes
from trainlib.optim import OptimConfig


def predicted_gb(rows: int) -> float:
    """Peak of a step without compilation, in GB of 10^9 bytes."""
    step = make_step("bf16", rows, 1, 512)
    return peak_bytes(Transformer(ModelConfig()), OptimConfig(), step) / 1e9


@pytest.mark.parametrize("profile, limit", [("rtx40", 18.0)])
def test_the_table_tells_what_a_step_takes(profile: str, limit: float):
    (row,) = [r for r in table() if r["profile"] == profile and r["typical"] == "yes"]
    gb = predicted_gb(int(row["micro_batch_size"]))
    assert gb == pytest.approx(float(row["peak_gb"]), rel=0.1)
    assert gb + CUDA_BYTES / 1e9 < limit


def test_memory_grows_with_rows_as_the_table_says():
    cards = [row for row in table() if row["precision"] == "bf16"]
    rows = sorted({(int(row["micro_batch_size"]), float(row["peak_gb"])) for row in cards})
    assert len(rows) > 4
    for (fewer, less), (more, most) in zip(rows, rows[1:], strict=False):
        assert (most - less) / (more - fewer) == pytest.approx(0.112, abs=0.01)
