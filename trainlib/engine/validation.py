"""Mean loss and metrics over the validation sets."""

import itertools
import math
from collections.abc import Iterator, Sequence

from trainlib.core.distributed import SINGLE_PROCESS, DistributedContext
from trainlib.core.hardware import Hardware
from trainlib.data.batch import Batch
from trainlib.data.epoch_plan import DataPosition
from trainlib.data.packing import PackedDataset
from trainlib.engine.device import evaluation_mode
from trainlib.engine.step import add_metrics, means
from trainlib.engine.training import LossFunction, Metrics, MetricSums, Training

NUM_EVALUATIONS, MAX_SHARE = 10, 0.1  # Limits of auto: their number, and their share of the run.
MIN_BATCHES = 8  # Of a small validation set, for the standard error; more are slow on a CPU.


def steps_between_evaluations(training: Training) -> int:
    """Return eval_every_steps as a number; 0 = evaluate only at the start and the end.

    For auto, the cost of an evaluation is not measured but counted, so that every machine evaluates
    at the same steps. While the number of steps is unknown (max_hours), Clock decides instead.
    """
    every, num_steps = training.run.config.eval_every_steps, training.schedule.num_steps
    if every != "auto":
        return every
    if num_steps is None:
        return 0
    num_rows = sum(val.num_rows() for val in training.datasets.val.values())
    cost = num_rows / (3 * training.loader.rows_per_step)  # In steps, which have backward passes.
    count = min(NUM_EVALUATIONS, int(MAX_SHARE * num_steps / cost) - 1)  # The first is extra.
    return math.ceil(num_steps / count) if count > 0 else 0


def validate(training: Training, loss_fn: LossFunction) -> Metrics:
    """Return the mean loss and metrics of each validation set, and of all sets combined.

    Keys are "loss" and "<name>/loss", and likewise for each metric of loss_fn. Replaces the values
    in training.val_batches. Raises Stopped between two batches if a stop is requested.
    """
    run, model = training.run, training.model
    mine: dict[str, list[MetricSums]] = {name: [] for name in training.datasets.val}
    with evaluation_mode(model):
        for name, dataset in training.datasets.val.items():
            for batch in run.control.between(micro_batches(dataset, run.hardware, run.distributed)):
                batch = batch.to(run.hardware.device)
                with run.hardware.autocast():
                    loss, metrics = loss_fn(model, batch)
                mine[name].append({"loss": (loss, batch.num_targets), **metrics})
    for sums in (sums for batches in mine.values() for sums in batches):
        sums.update({key: (float(sum_), float(n)) for key, (sum_, n) in sums.items()})
    gathered = run.distributed.all_gather_object(mine)
    results, total = Metrics(), MetricSums()
    training.val_batches.clear()
    for name in training.datasets.val:
        of_set = MetricSums()
        # The ranks take turns, so this is the order on one rank.
        turns = itertools.zip_longest(*(theirs[name] for theirs in gathered))
        for sums in filter(None, itertools.chain.from_iterable(turns)):
            add_metrics(of_set, sums)
            training.val_batches.append(sums["loss"])
        add_metrics(total, of_set)
        results.update({f"{name}/{key}": value for key, value in means(of_set).items()})
    return {**means(total), **results}


def difference_error(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """Return the standard error of the difference between the mean losses of two evaluations.

    Each of their B batches, with loss sums a and b and n targets, is one sample of a ratio
    estimator: with s = b - a and L = sum(s) / sum(n), sqrt(B / (B - 1) * sum((s - L n)^2)) / sum(n)
    (Cochran, Sampling Techniques, section 6.4). Returns 0 for fewer than 2 batches, and for batches
    that differ, because the hardware settings have changed.
    """
    sizes = [n for _, n in second]
    if len(sizes) < 2 or [n for _, n in first] != sizes:
        return 0.0
    changes = [b - a for (a, _), (b, _) in zip(first, second, strict=True)]
    mean, count = sum(changes) / sum(sizes), len(sizes)
    squares = sum((s - mean * n) ** 2 for s, n in zip(changes, sizes, strict=True))
    return math.sqrt(count / (count - 1) * squares) / sum(sizes)


def micro_batches(
    dataset: PackedDataset, hardware: Hardware, distributed: DistributedContext = SINGLE_PROCESS
) -> Iterator[Batch]:
    """Yield this rank's share of a data set's first epoch, in micro-batches.

    For compiled layers, all have the shape of training: the last one is padded with empty rows.
    """
    rows, size = [row for row, _ in dataset.rows(DataPosition())], hardware.micro_batch_size
    if not hardware.compile:
        size = min(size, -(-len(rows) // MIN_BATCHES))
    for start in range(distributed.rank * size, len(rows), distributed.world_size * size):
        chunk = rows[start : start + size]
        yield dataset.collate(chunk, size if hardware.compile else len(chunk))
