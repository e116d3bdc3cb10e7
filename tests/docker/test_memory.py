"""Protects the micro batches of configs/hardware.tsv: the memory that they are said to take.

The default model's whole step is run on tensors without content, and what they would take is
counted.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from losses import cross_entropy_sum
from model import ModelConfig, Transformer
from tests.docker.test_choice import table

CUDA_ITSELF_GB = 0.7


def predicted_gb(rows: int) -> float:
    """Peak of a step without compilation, in GB of 10^9 bytes."""
    with FakeTensorMode():
        model = Transformer(ModelConfig())
        ids = torch.zeros(rows, 512, dtype=torch.int64)
        optimizer = torch.optim.AdamW(model.parameters())
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(input_ids=ids, position_ids=ids, document_ids=ids)
                loss = cross_entropy_sum(logits, ids)
            loss.backward()
            optimizer.step()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    return peak["Total"] / 1e9


@pytest.mark.parametrize("profile, limit", [("rtx40", 18.0)])
def test_the_table_tells_what_a_step_takes(profile: str, limit: float):
    (row,) = [r for r in table() if r["profile"] == profile and r["typical"] == "yes"]
    gb = predicted_gb(int(row["micro_batch_size"]))
    assert gb == pytest.approx(float(row["peak_gb"]), rel=0.1)
    assert gb + CUDA_ITSELF_GB < limit


def test_memory_grows_with_rows_as_the_table_says():
    cards = [row for row in table() if row["precision"] == "bf16"]
    rows = sorted({(int(row["micro_batch_size"]), float(row["peak_gb"])) for row in cards})
    assert len(rows) > 4
    for (fewer, less), (more, most) in zip(rows, rows[1:], strict=False):
        assert (most - less) / (more - fewer) == pytest.approx(0.18, abs=0.01)
