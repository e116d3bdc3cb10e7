"""What preference optimization needs beside its loss: the reference, and a report by kind.

The reference model is the model that training starts from. Its log-probabilities are computed
once, for the pairs that the run will visit, and kept on disk; no second model is in the loop.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainlib.core.files import cache_dir, replacing
from trainlib.data.batch import Batch
from trainlib.data.epoch_plan import DataPosition
from trainlib.data.packing import Datasets, PackedDataset
from trainlib.engine.device import evaluation_mode
from trainlib.engine.losses import batch_log_probs
from trainlib.engine.run import Run
from trainlib.engine.training import Training
from trainlib.engine.validation import micro_batches

log = logging.getLogger(__name__)

TIE_NATS = 1e-3
"""Log-probability ratios closer than this are equal: below it fp32 sums of logits are noise."""
FORWARD = 3
"""Raised whenever the decoder comes to round otherwise, so that no older reference is used."""


def reference_log_probs(training: Training) -> Tensor:
    """Return the log-probabilities of the starting model by sequence id; shape (sequences,).

    NaN for sequences that this run never visits; a run without a number of steps visits all. The
    processes share the work. Read from .cache/reference/ as far as an earlier run computed them.
    """
    run, model, datasets, loader = (
        training.run, training.model, training.datasets, training.loader
    )  # fmt: skip
    everything = [datasets.train, *datasets.val.values()]
    last = everything[-1]
    values = np.full(last.first_sequence_id + last.num_sequences, np.nan, np.float32)
    h = run.hardware
    how = f"{datasets.data_key} {h.precision} {h.kernels} {h.compile} {datasets.train.row_length}"
    digest = hashlib.sha256(f"{how} {FORWARD}".encode())
    for packed in everything:
        digest.update(packed.selection)
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    path = cache_dir() / "reference" / f"{digest.hexdigest()[:16]}.npy"
    if path.is_file():
        values = np.load(path)
    before, begin = np.isfinite(values).sum(), time.perf_counter()

    def fill(batch: Batch) -> None:
        ids = batch.sequence_ids.numpy()
        if np.isnan(values[ids]).any():
            moved = batch.to(run.hardware.device)
            with run.hardware.autocast():
                values[ids] = batch_log_probs(model, moved).float().cpu().numpy()

    with evaluation_mode(model):
        for packed in datasets.val.values():
            for batch in micro_batches(packed, run.hardware, run.ranks):
                fill(batch)
        one_epoch = -(-datasets.train.num_rows() // loader.rows_per_step)
        for _ in range(min(training.schedule.num_steps or one_epoch, one_epoch)):
            for batch in next(loader).micro_batches:
                fill(batch)
    loader.seek(DataPosition())
    for theirs in run.ranks.gather(values):
        values = np.where(np.isnan(values), theirs, values)
    known = np.isfinite(values).sum()
    log.info("reference: %d answers computed in %.1f s, %d from the cache", known - before,
             time.perf_counter() - begin, before)  # fmt: skip
    if known > before and run.ranks.first:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            np.save(temporary, values)
    return torch.from_numpy(values).to(run.hardware.device)


def share_above(values: np.ndarray) -> float:
    """Share of values above 0, ties half."""
    ties = np.abs(values) <= TIE_NATS
    return float(np.where(ties, 0.5, values > 0).mean())


def report(
    run: Run, model: nn.Module, datasets: Datasets, reference: Tensor, latest: Tensor
) -> dict[str, Any]:
    """Held-out and trained accuracy of each kind of pair, and what trivial rules reach.

    For each kind: n, accuracy (share of pairs whose reward margin is above 0) with its standard
    error, the same on trained pairs, the policy's own preference (log-probability of chosen above
    that of rejected) before and after, and the best of three rules: longer, shorter, more overlap
    with the prompt. `latest` holds the policy's log-probabilities by sequence id, as far as they
    are known; what is NaN there is computed, and filled in.
    """
    before, after = reference.cpu().numpy(), latest.cpu().numpy()
    held_out: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    trained: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    with evaluation_mode(model):
        for name, packed in datasets.val.items():
            _measure(run, model, packed, before, after, name, held_out, math.inf)
        _measure(run, model, datasets.train, before, after, "", trained, 400)
    latest.copy_(torch.from_numpy(after))
    table: dict[str, Any] = {}
    for kind, rows in sorted(held_out.items()):
        margin, own_before, own_after, longer, overlap = np.array(rows).T
        accuracy, n = share_above(margin), len(rows)
        rules = {
            "longer": share_above(longer),
            "shorter": 1 - share_above(longer),
            "more overlap": share_above(overlap),
        }
        best = max(rules, key=lambda rule: rules[rule])
        table[kind] = {
            "n": n,
            "accuracy": accuracy,
            "standard_error": math.sqrt(accuracy * (1 - accuracy) / n),
            "trained": share_above(np.array(trained[kind])[:, 0]) if trained[kind] else None,
            "own_before": share_above(own_before),
            "own_after": share_above(own_after),
            "rule": best,
            "rule_accuracy": rules[best],
        }
    return table


def format_report(table: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    lines = [
        f"{'kind of pair':<14}{'n':>6}{'accuracy':>10}{'+-':>7}{'trained':>9}"
        f"{'own before':>12}{'own after':>11}   best trivial rule"
    ]
    for kind, row in table.items():
        trained = f"{row['trained']:.3f}" if row["trained"] is not None else "-"
        lines.append(
            f"{kind:<14}{row['n']:>6}{row['accuracy']:>10.3f}{row['standard_error']:>7.3f}"
            f"{trained:>9}{row['own_before']:>12.3f}{row['own_after']:>11.3f}"
            f"   {row['rule']} {row['rule_accuracy']:.3f}"
        )
    return "\n".join(lines)


def _measure(
    run: Run,
    model: nn.Module,
    packed: PackedDataset,
    before: np.ndarray,
    after: np.ndarray,
    default_kind: str,
    into: dict[str, list[tuple[float, ...]]],
    max_pairs: float,
) -> None:
    """Add (margin, own before, own after, length and overlap difference) of each pair by kind."""
    origins, count = packed.origins(), 0
    for batch in micro_batches(packed, run.hardware):
        ids = batch.sequence_ids.numpy()
        if np.isnan(before[ids]).any():
            continue  # A training row that the run's length did not visit.
        if np.isnan(after[ids]).any():
            moved = batch.to(run.hardware.device)
            with run.hardware.autocast():
                after[ids] = batch_log_probs(model, moved).float().cpu().numpy()
        old, new = before[ids], after[ids]
        ratio = new - old
        lengths, overlaps = _trivial(batch)
        for pair in range(0, len(ids), 2):
            kind = origins[int(ids[pair])].source or default_kind or "pairs"
            chosen, rejected = pair, pair + 1
            into[kind].append(
                tuple(float(x[chosen] - x[rejected]) for x in (ratio, old, new, lengths, overlaps))
            )
            count += 1
        if count >= max_pairs:
            return


def _trivial(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Length of each answer in tokens, and the share of its tokens that its prompt holds."""
    num_documents = len(batch.sequence_ids)
    lengths, overlaps = np.zeros(num_documents), np.zeros(num_documents)
    documents, labels = batch.document_ids.numpy(), batch.labels.numpy()
    inputs = batch.input_ids.numpy()
    for document in range(num_documents):
        here = documents == document
        answer = labels[here][labels[here] >= 0]
        prompt = set(inputs[here][labels[here] < 0].tolist())
        lengths[document] = len(answer)
        overlaps[document] = np.mean([token in prompt for token in answer.tolist()])
    return lengths, overlaps
