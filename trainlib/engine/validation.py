"""Mean loss and metrics over the validation sets."""

from __future__ import annotations

from typing import Any

from torch import nn

from trainlib.core.distributed import Ranks
from trainlib.data.loader import ALONE, Place
from trainlib.engine.device import Hardware, LossFunction, looking
from trainlib.engine.run import Run
from trainlib.engine.step import Metrics, add_metrics, means


def validate(run: Run, model: nn.Module, loss_fn: LossFunction, datasets: dict) -> Metrics:
    """Mean loss and metrics over each validation set, and over all of them together.

    Returns {"loss": ..., "<name>/loss": ...}, likewise for every metric that loss_fn gives. The
    ranks share the work. Neither the random state nor the model's mode is changed.
    """
    shares: dict[str, dict[str, tuple[float, float]]] = {}
    with looking(model):
        for name, dataset in datasets.items():
            sums: dict[str, tuple[Any, Any]] = {}
            for batch in micro_batches(dataset, run.hardware, run.ranks):
                batch = batch.to(run.hardware.device)
                with run.hardware.autocast():
                    loss, metrics = loss_fn(model, batch)
                add_metrics(sums, {"loss": (loss, batch.num_targets), **metrics})
            shares[name] = {key: (float(sum_), float(n)) for key, (sum_, n) in sums.items()}
    results: Metrics = {}
    total: dict[str, tuple[Any, Any]] = {}
    everybody = run.ranks.gather(shares)
    for name in datasets:
        sums = {}
        for theirs in everybody:
            add_metrics(sums, theirs[name])
        add_metrics(total, sums)
        results.update({f"{name}/{key}": value for key, value in means(sums).items()})
    return {**means(total), **results}


def micro_batches(dataset: Any, hardware: Hardware, ranks: Ranks = ALONE) -> Any:
    """The first epoch of a data set in micro-batches; of these, a rank's share.

    For compiled layers all are of one shape, the last one filled up with empty rows.
    """
    rows, size = [row for row, _ in dataset.rows(Place())], hardware.micro_batch_size
    for start in range(ranks.rank * size, len(rows), ranks.count * size):
        some = rows[start : start + size]
        yield dataset.collate(some, size if hardware.compile else len(some))
