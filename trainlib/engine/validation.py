"""Mean loss and metrics over the validation sets."""

from __future__ import annotations

from collections.abc import Iterator

from trainlib.core.distributed import SINGLE_PROCESS, DistributedContext
from trainlib.data.batch import Batch
from trainlib.data.epoch_plan import DataPosition
from trainlib.data.packing import PackedDataset
from trainlib.engine.device import Hardware, evaluation_mode
from trainlib.engine.step import add_metrics, means
from trainlib.engine.training import LossFunction, Metrics, MetricSums, Training


def validate(training: Training, loss_fn: LossFunction) -> Metrics:
    """Return the mean loss and metrics of each validation set, and of all sets combined.

    Keys are "loss" and "<name>/loss", and likewise for each metric of loss_fn. The ranks share the
    work. The RNG state and the model's mode do not change.
    """
    run, model, shares = training.run, training.model, {}
    with evaluation_mode(model):
        for name, dataset in training.datasets.val.items():
            sums: MetricSums = {}
            for batch in micro_batches(dataset, run.hardware, run.distributed):
                batch = batch.to(run.hardware.device)
                with run.hardware.autocast():
                    loss, metrics = loss_fn(model, batch)
                add_metrics(sums, {"loss": (loss, batch.num_targets), **metrics})
            shares[name] = {key: (float(sum_), float(n)) for key, (sum_, n) in sums.items()}
    results: Metrics = {}
    total: MetricSums = {}
    gathered = run.distributed.all_gather_object(shares)
    for name in training.datasets.val:
        sums = {}
        for share in gathered:
            add_metrics(sums, share[name])
        add_metrics(total, sums)
        results.update({f"{name}/{key}": value for key, value in means(sums).items()})
    return {**means(total), **results}


def micro_batches(
    dataset: PackedDataset, hardware: Hardware, distributed: DistributedContext = SINGLE_PROCESS
) -> Iterator[Batch]:
    """Yield this rank's share of a data set's first epoch, in micro-batches.

    For compiled layers, the last one is padded with empty rows, so that all have the same shape.
    """
    rows, size = [row for row, _ in dataset.rows(DataPosition())], hardware.micro_batch_size
    for start in range(distributed.rank * size, len(rows), distributed.world_size * size):
        chunk = rows[start : start + size]
        yield dataset.collate(chunk, size if hardware.compile else len(chunk))
