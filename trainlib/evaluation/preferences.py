"""Reference log-probabilities and the evaluation report for preference optimization.

The reference model is the model that training starts from. Its log-probabilities are computed
once, for the pairs that the run will visit, and cached on disk; training needs no second model.
"""

import hashlib
import json
import logging
import math
import time
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainlib.core.errors import Stopped
from trainlib.core.files import cache_dir, replacing, write_atomically
from trainlib.data.batch import Batch
from trainlib.data.epoch_plan import DataPosition
from trainlib.data.packing import FEW_ROWS, Datasets, PackedDataset
from trainlib.engine.code import code_digest
from trainlib.engine.device import Hardware, evaluation_mode
from trainlib.engine.losses import batch_log_probs
from trainlib.engine.progress import table
from trainlib.engine.run import Run
from trainlib.engine.training import Training
from trainlib.engine.validation import micro_batches

log = logging.getLogger(__name__)

SAVE_SECONDS = 60.0
TIE_NATS = 1e-3
"""Log-probability ratios closer than this count as equal: smaller differences are fp32 noise."""


def reference_log_probs(training: Training, reported: Datasets) -> Tensor:
    """Compute the starting model's log-probabilities by sequence id; shape (sequences,).

    `reported` has the validation rows of the report. NaN for sequences that are in none of them and
    that this run never visits; a run of unknown length visits every sequence. The processes share
    the work. Values cached in .cache/reference/ are reused.
    """
    run, model, datasets = training.run, training.model, training.datasets
    values, h = _unknown(datasets), run.hardware
    key = f"{datasets.data_key} {h.precision} {h.kernels} {h.compile} {datasets.train.row_length}"
    digest = hashlib.sha256(f"{key} {code_digest(run.stage)}".encode())
    for packed in (datasets.train, *datasets.val.values()):
        digest.update(packed.selection)
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    folder, name = cache_dir() / "reference", digest.hexdigest()[:16]
    for path in folder.glob(f"{name}*.npz"):
        values = _read_values(path, values)
    before, begin = np.isfinite(values).sum(), time.perf_counter()
    part = folder / f"{name}.{run.distributed.rank}.npz"
    with run.control:
        batches = run.control.between(_visited(training, reported))
        try:
            _compute(h, model, batches, values, part)
        except Stopped:
            _save_values(part, values)
            raise
    for theirs in run.distributed.all_gather_object(values):
        values = np.where(np.isnan(values), theirs, values)
    known = np.isfinite(values).sum()
    log.info("reference: %d answers computed in %.1f s, %d from the cache", known - before,
             time.perf_counter() - begin, before)  # fmt: skip
    if known > before and run.distributed.is_main:
        _save_values(folder / f"{name}.npz", values)
        for path in folder.glob(f"{name}.*.npz"):
            path.unlink(missing_ok=True)
    return torch.from_numpy(values).to(h.device)


def _visited(training: Training, reported: Datasets) -> Iterator[Batch]:
    """Yield this rank's batches of the run: of validation, and of an epoch of training at most."""
    run, loader, datasets = training.run, training.loader, training.datasets
    for packed in (*datasets.val.values(), *reported.val.values()):
        yield from micro_batches(packed, run.hardware, run.distributed)
    one_epoch = -(-datasets.train.num_rows() // loader.rows_per_step)
    for _ in range(min(training.schedule.num_steps or one_epoch, one_epoch)):
        yield from next(loader).micro_batches
    loader.seek(DataPosition())


def validation_log_probs(hardware: Hardware, model: nn.Module, datasets: Datasets) -> np.ndarray:
    """Return a model's log-probabilities by sequence id; NaN for training pairs."""
    batches = (b for packed in datasets.val.values() for b in micro_batches(packed, hardware))
    values = _unknown(datasets)
    _compute(hardware, model, batches, values)
    return values


def _unknown(datasets: Datasets) -> np.ndarray:
    *_, last = (datasets.train, *datasets.val.values())
    return np.full(last.first_sequence_id + last.num_sequences, np.nan, np.float32)


def _read_values(path: Path, values: np.ndarray) -> np.ndarray:
    """Return the values, with unknown ones from a file; zip files have checksums."""
    try:
        with np.load(path) as file:
            return np.where(np.isnan(values), file["values"], values)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        log.warning("%s is damaged (%s), so its values are computed again", path, error)
    return values


def _save_values(path: Path, values: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            np.savez(temporary, values=values)
    except OSError as error:
        log.warning("%s could not be written (%s); a rerun computes it again", path, error)


def _compute(
    hardware: Hardware, model: nn.Module, batches: Iterable[Batch], values: np.ndarray,
    path: Path | None = None,
) -> None:  # fmt: skip
    """Compute the log-probabilities, by sequence id, that are NaN; save them every minute."""
    saved = time.monotonic()
    with evaluation_mode(model):
        for batch in batches:
            ids = batch.sequence_ids.numpy()
            if np.isnan(values[ids]).any():
                with hardware.autocast():
                    log_probs = batch_log_probs(model, batch.to(hardware.device))
                values[ids] = log_probs.float().cpu().numpy()
            if path is not None and time.monotonic() - saved > SAVE_SECONDS:
                _save_values(path, values)
                saved = time.monotonic()


def share_above(values: np.ndarray) -> float:
    """Return the fraction of values above 0; ties count half."""
    ties = np.abs(values) <= TIE_NATS
    return float(np.where(ties, 0.5, values > 0).mean())


def best_rule(longer: float, overlap: float) -> tuple[str, float]:
    """Return the most accurate trivial rule and its accuracy, from those of two rules."""
    rules = {"longer": longer, "shorter": 1 - longer, "more overlap": overlap}
    best = max(rules, key=lambda rule: rules[rule])
    return best, rules[best]


def write_report(run: Run, datasets: Datasets, before: np.ndarray, after: np.ndarray) -> None:
    """Write report.json: the accuracy on each kind of held-out pair, and that of trivial rules.

    For each kind: n, accuracy (fraction of pairs with a reward margin above 0) with its standard
    error (None below FEW_ROWS pairs), the policy's own preference (fraction of pairs whose chosen
    answer is more likely) before and after training, and the best of three rules: longer, shorter,
    more overlap with the prompt. `before` and `after` are the log-probabilities by sequence id.
    """
    by_kind = defaultdict(list)
    for name, packed in datasets.val.items():
        for kind, margins in pair_margins(packed, before, after):
            by_kind[kind or name or "pairs"].append(margins)
    result: dict[str, Any] = {}
    for kind, rows in sorted(by_kind.items()):
        shares = [share_above(column) for column in np.array(rows).T]
        accuracy, own_before, own_after, longer, overlap = shares
        best, rule_accuracy = best_rule(longer, overlap)
        error = math.sqrt(accuracy * (1 - accuracy) / len(rows)) if len(rows) >= FEW_ROWS else None
        result[kind] = {
            "n": len(rows), "accuracy": accuracy, "standard_error": error,
            "own_before": own_before, "own_after": own_after,
            "rule": best, "rule_accuracy": rule_accuracy,
        }  # fmt: skip
    write_atomically(run.folder / "report.json", json.dumps(result, indent=2))
    log.info("%s", "\n".join(format_report(result)))


def format_report(report: dict[str, Any]) -> list[str]:
    """Return the report as lines for a terminal."""
    shares = {"accuracy": "accuracy", "+-": "standard_error", "policy before": "own_before",
              "policy after": "own_after"}  # fmt: skip
    rows = {
        kind: {"n": str(row["n"])}
        | {title: "-" if row[key] is None else f"{row[key]:.3f}" for title, key in shares.items()}
        | {"best trivial rule": f"{row['rule']} {row['rule_accuracy']:.3f}"}
        for kind, row in report.items()
    }
    few = ", ".join(kind for kind, row in report.items() if row["n"] < FEW_ROWS)
    note = f"fewer than {FEW_ROWS} pairs, so the figures mean little: {few}"
    return [*table("kind of pair", rows), *([note] if few else [])]


def pair_margins(
    packed: PackedDataset, before: np.ndarray, after: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each pair's kind, and the difference between chosen and rejected in five values.

    These are log-probability ratio, log-probability before and after, number of ids, and fraction
    of the ids that also occur in the prompt. `before` and `after` are log-probabilities by sequence
    id; skips pairs with NaN, which were not read.
    """
    for id_, (cache, record) in packed.origins().items():
        old, new = before[id_ : id_ + 2], after[id_ : id_ + 2]
        if np.isfinite(new - old).all():
            values = [new - old, old, new, np.zeros(2), np.zeros(2)]
            for i in (0, 1):
                span = slice(*cache.offsets[2 * record + i :][:2])
                ids, supervised = cache.ids[span], cache.supervised[span] != 0
                answer = ids[supervised]
                values[3][i], values[4][i] = len(answer), np.isin(answer, ids[~supervised]).mean()
            yield cache.source(record), np.array([chosen - rejected for chosen, rejected in values])
