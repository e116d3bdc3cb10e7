"""Memory and time of one step of our model, without data loading or the training loop.

    python -m bench.step --model FOLDER [--rows 8] [--length 512] [--steps 3] [--matmul WORD]

Prints one JSON object. bench.peers prints the same for the peer's step.
"""

from __future__ import annotations

import trainlib.core.threads  # noqa: F401  # Before torch.

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from bench.common import measure_step
from trainlib.core.distributed import SINGLE_PROCESS
from trainlib.core.hardware import Hardware, choose_hardware, find_facts
from trainlib.core.terminal import use_replacement_characters
from trainlib.data.batch import Batch
from trainlib.engine.device import use_hardware
from trainlib.engine.kernels import choose_kernels
from trainlib.engine.losses import cross_entropy_sum
from trainlib.models.hf_folder import load_model


def own_step(folder: Path, rows: int, length: int, count: int = 0) -> dict[str, float]:
    """Return the "peak" bytes and tokens "per_second" of forward, backward and AdamW in fp32.

    Each row is one document with a label at every position. `count` steps are timed, if any.
    """
    model = load_model(folder)
    hardware = Hardware(torch.device("cpu"), "fp32", cpu_choice().attention, False, rows)
    choose_kernels(hardware, model.config, length, SINGLE_PROCESS)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = rows_of_one_document(rows, length)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy_sum(model(**batch.inputs), batch.selected(batch.labels)).backward()
        optimizer.step()

    return measure_step(step, model, optimizer, rows * length, count)


def cpu_choice() -> Hardware:
    """Return a run's hardware settings on this CPU, except precision, which needs a measurement."""
    return choose_hardware(find_facts(), device="cpu")


def rows_of_one_document(rows: int, length: int) -> Batch:
    """Return a batch of random tokens in the layout of train.py's batches."""
    ids = torch.randint(100, 6000, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(rows).repeat_interleave(length).view(rows, length)
    edges = torch.arange(rows + 1, dtype=torch.int32) * length
    total = rows * length
    return Batch(ids[:, :-1], ids[:, 1:], torch.arange(length).repeat(rows, 1), documents, edges,
                 torch.arange(rows), total, 1, total)  # fmt: skip


def main() -> None:
    """Measure in a separate process, as is done for the peer."""
    use_replacement_characters()
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--matmul", default=cpu_choice().matmul)
    options = parser.parse_args()
    use_hardware(replace(cpu_choice(), matmul=options.matmul))
    print(json.dumps(own_step(options.model, options.rows, options.length, options.steps)))


if __name__ == "__main__":
    main()
