"""Reference log-probabilities and the evaluation report for preference optimization.

The reference model is the model that training starts from. Its log-probabilities are computed
once, for the pairs that the run will visit, and cached on disk; training needs no second model.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import model as model_module
from trainlib.core.files import cache_dir, replacing
from trainlib.data.batch import Batch
from trainlib.data.epoch_plan import DataPosition
from trainlib.data.packing import FEW_ROWS, Datasets, PackedDataset
from trainlib.engine.device import Hardware, evaluation_mode
from trainlib.engine.losses import batch_log_probs
from trainlib.engine.run import Run
from trainlib.engine.training import Training
from trainlib.engine.validation import micro_batches

log = logging.getLogger(__name__)

TIE_NATS = 1e-3
"""Log-probability ratios closer than this count as equal: smaller differences are fp32 noise."""
NUMERICS_VERSION = 3
"""Increase this when the rounding of kernels/ changes, so that cached references are not reused."""
TRAINING_PAIRS = 400
"""Number of training pairs in the report."""


def reference_log_probs(training: Training) -> Tensor:
    """Compute the starting model's log-probabilities by sequence id; shape (sequences,).

    NaN for sequences that this run never visits; a run of unknown length is assumed to visit every
    sequence. The processes share the work. Values cached in .cache/reference/ are reused.
    """
    run, model, datasets = training.run, training.model, training.datasets
    all_datasets = [datasets.train, *datasets.val.values()]
    last = all_datasets[-1]
    values = np.full(last.first_sequence_id + last.num_sequences, np.nan, np.float32)
    h = run.hardware
    key = f"{datasets.data_key} {h.precision} {h.kernels} {h.compile} {datasets.train.row_length}"
    digest = hashlib.sha256(f"{key} {NUMERICS_VERSION}".encode())
    for packed in all_datasets:
        digest.update(packed.selection)
    digest.update(Path(model_module.__file__).read_bytes())  # Users may edit formulas.
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    path = cache_dir() / "reference" / f"{digest.hexdigest()[:16]}.npy"
    if path.is_file():
        values = np.load(path)
    before, begin = np.isfinite(values).sum(), time.perf_counter()
    with evaluation_mode(model):
        for packed in datasets.val.values():
            for batch in micro_batches(packed, h, run.distributed):
                _fill(h, model, batch, values)
        loader = training.loader
        one_epoch = -(-datasets.train.num_rows() // loader.rows_per_step)
        for _ in range(min(training.schedule.num_steps or one_epoch, one_epoch)):
            for batch in next(loader).micro_batches:
                _fill(h, model, batch, values)
    loader.seek(DataPosition())
    for theirs in run.distributed.all_gather_object(values):
        values = np.where(np.isnan(values), theirs, values)
    known = np.isfinite(values).sum()
    log.info("reference: %d answers computed in %.1f s, %d from the cache", known - before,
             time.perf_counter() - begin, before)  # fmt: skip
    if known > before and run.distributed.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            np.save(temporary, values)
    return torch.from_numpy(values).to(h.device)


def share_above(values: np.ndarray) -> float:
    """Return the fraction of values above 0; ties count half."""
    ties = np.abs(values) <= TIE_NATS
    return float(np.where(ties, 0.5, values > 0).mean())


def best_rule(longer: float, overlap: float) -> tuple[str, float]:
    """Return the most accurate trivial rule and its accuracy, from those of two rules."""
    rules = {"longer": longer, "shorter": 1 - longer, "more overlap": overlap}
    best = max(rules, key=lambda rule: rules[rule])
    return best, rules[best]


def report(
    run: Run, model: nn.Module, datasets: Datasets, reference: Tensor, latest: Tensor
) -> dict[str, Any]:
    """Return the accuracy on each kind of held-out and training pair, and of trivial rules.

    For each kind: n, accuracy (fraction of pairs with a reward margin above 0) with its standard
    error (None below FEW_ROWS pairs), accuracy on training pairs, the policy's own preference
    (fraction of pairs whose chosen answer is more likely) before and after training, and the best
    of three rules: longer, shorter, more overlap with the prompt. `latest` holds the policy's
    log-probabilities by sequence id; NaN values are computed and filled in.
    """
    before, after = reference.cpu().numpy(), latest.cpu().numpy()
    held_out, trained = defaultdict(list), defaultdict(list)
    with evaluation_mode(model):
        for name, packed in datasets.val.items():
            for _, kind, margins in pair_margins(run.hardware, model, packed, before, after):
                held_out[kind or name or "pairs"].append(margins)
        pairs = pair_margins(run.hardware, model, datasets.train, before, after)
        for _, kind, margins in itertools.islice(pairs, TRAINING_PAIRS):
            trained[kind or "pairs"].append(margins)
    latest.copy_(torch.from_numpy(after))
    table: dict[str, Any] = {}
    for kind, rows in sorted(held_out.items()):
        shares = [share_above(column) for column in np.array(rows).T]
        accuracy, own_before, own_after, longer, overlap = shares
        best, rule_accuracy = best_rule(longer, overlap)
        table[kind] = {
            "n": len(rows),
            "accuracy": accuracy,
            "standard_error": math.sqrt(accuracy * (1 - accuracy) / len(rows))
            if len(rows) >= FEW_ROWS
            else None,
            "trained": share_above(np.array(trained[kind])[:, 0]) if trained[kind] else None,
            "own_before": own_before,
            "own_after": own_after,
            "rule": best,
            "rule_accuracy": rule_accuracy,
        }
    return table


def format_report(table: dict[str, Any]) -> str:
    """Format the report as lines for a terminal."""
    lines = [
        f"{'kind of pair':<14}{'n':>6}{'accuracy':>10}{'+-':>7}{'train':>9}"
        f"{'policy before':>15}{'policy after':>14}   best trivial rule"
    ]
    for kind, row in table.items():
        trained, error = (
            f"{row[key]:.3f}" if row[key] is not None else "-"
            for key in ("trained", "standard_error")
        )
        lines.append(
            f"{kind:<14}{row['n']:>6}{row['accuracy']:>10.3f}{error:>7}{trained:>9}"
            f"{row['own_before']:>15.3f}{row['own_after']:>14.3f}"
            f"   {row['rule']} {row['rule_accuracy']:.3f}"
        )
    few = ", ".join(kind for kind, row in table.items() if row["n"] < FEW_ROWS)
    if few:
        lines.append(f"fewer than {FEW_ROWS} pairs, so the figures mean little: {few}")
    return "\n".join(lines)


def _fill(hardware: Hardware, model: nn.Module, batch: Batch, values: np.ndarray) -> np.ndarray:
    """Compute a batch's log-probabilities if any is NaN in `values`; return them."""
    ids = batch.sequence_ids.numpy()
    if np.isnan(values[ids]).any():
        with hardware.autocast():
            log_probs = batch_log_probs(model, batch.to(hardware.device))
        values[ids] = log_probs.float().cpu().numpy()
    return values[ids]


def pair_margins(
    hardware: Hardware, model: nn.Module, packed: PackedDataset, before: np.ndarray,
    after: np.ndarray,
) -> Iterator[tuple[int, str, np.ndarray]]:  # fmt: skip
    """Yield each pair's id and kind, and the difference between chosen and rejected in five values.

    These are log-probability ratio, log-probability before and after, length and overlap. `before`
    and `after` hold log-probabilities by sequence id; NaN values in `after` are computed and filled
    in. Skips pairs with NaN in `before`. Call it in evaluation_mode.
    """
    origins = packed.origins()
    for batch in micro_batches(packed, hardware):
        ids = batch.sequence_ids.numpy()
        old = before[ids]
        if np.isnan(old).any():
            continue  # The run did not visit this training row.
        new = _fill(hardware, model, batch, after)
        values = np.stack([new - old, old, new, *_length_and_overlap(batch)])
        for id_, margins in zip(ids[::2], (values[:, ::2] - values[:, 1::2]).T, strict=True):
            yield int(id_), origins[int(id_)].source, margins


def _length_and_overlap(batch: Batch) -> tuple[list[int], list[float]]:
    """Return each answer's length in tokens, and the fraction that also occur in its prompt."""
    lengths, overlaps = [], []
    for document in range(len(batch.sequence_ids)):
        here = batch.document_ids == document
        labels = batch.labels[here]
        answer = labels[labels >= 0].tolist()
        prompt = set(batch.input_ids[here][labels < 0].tolist())
        lengths.append(len(answer))
        overlaps.append(float(np.mean([token in prompt for token in answer])))
    return lengths, overlaps
