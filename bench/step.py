"""One plain training step of ours: what it takes in memory and time, without data and loop."""

from __future__ import annotations

from pathlib import Path

import torch

from batch import Batch
from bench.allocated import measured
from hf_folder import load_model
from losses import cross_entropy_sum


def own_step(folder: Path, rows: int, length: int, count: int = 0) -> dict[str, float]:
    """{"peak" in bytes, "per_second" in tokens} of forward, backward and AdamW, in fp32.

    A row is one document and every position a label; `count` steps are timed, 0 = none.
    """
    model = load_model(folder)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = rows_of_one_document(rows, length)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy_sum(model(**batch.inputs), batch.selected(batch.labels)).backward()
        optimizer.step()

    return measured(step, model, optimizer, rows * length, count)


def rows_of_one_document(rows: int, length: int) -> Batch:
    """Random tokens, as train.py's batches are."""
    ids = torch.randint(100, 6000, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(rows).repeat_interleave(length).view(rows, length)
    edges = torch.arange(rows + 1, dtype=torch.int32) * length
    total = rows * length
    return Batch(ids[:, :-1], ids[:, 1:], torch.arange(length).repeat(rows, 1), documents, edges,
                 torch.arange(rows), total, 1, total)  # fmt: skip
