"""Model-free baselines for validation bits per byte: uniform, unigram, bigram.

    uniform   every id is equally likely: log2 V bits per token
    unigram   frequency of each id in the training data, with one added to every count
    bigram    frequency given the previous id, smoothed with the unigram

All are measured on the labels that validation reads. The counts are taken from the supervised
labels among at most MAX_TRAIN_IDS ids, in blocks spread evenly over the training files.

Source: Witten-Bell smoothing as in Chen and Goodman, arXiv:cmp-lg/9606011, section 2.6.
"""

import functools
import logging
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tokenizer.bpe import Tokenizer
from trainlib.data.batch import IGNORE_INDEX
from trainlib.data.epoch_plan import DataPosition
from trainlib.data.packing import Datasets, PackedDataset
from trainlib.data.token_cache import TokenCache

log = logging.getLogger(__name__)

MAX_TRAIN_IDS = 20_000_000
BLOCK = 1 << 16  # Ids read at a time.


class Labels(NamedTuple):
    """Supervised labels and the id before each; int64, shapes (N,)."""

    previous: np.ndarray
    ids: np.ndarray


def with_baselines(datasets: Datasets, tokenizer: Tokenizer) -> Datasets:
    """Add baselines for pretraining or fine-tuning data, over the labels of all validation sets."""
    everything = {"": list(datasets.val.values())}
    baselines = measure(datasets.train, everything, tokenizer)[""]
    values = ", ".join(f"{name} {value:.3f}" for name, value in baselines.items())
    log.info("baselines in bits per byte of the validation text: %s", values)
    return datasets._replace(baselines=baselines)


def measure(train: PackedDataset, val: dict[str, list[PackedDataset]],
            tokenizer: Tokenizer) -> dict[str, dict[str, float]]:  # fmt: skip
    """Return the bits per byte of each baseline, over the labels of each list of data sets."""
    texts = tokenizer.id_to_bytes
    sizes = np.array([len(text) for text in texts])
    counts = count_pairs(training_labels(train.parts, MAX_TRAIN_IDS), len(texts))
    baselines = {}
    for name, packed in val.items():
        labels = validation_labels(packed)
        num_bytes = int(sizes[labels.ids].sum())
        bits = (len(labels.ids) * math.log2(len(texts)), *ngram_bits(counts, labels))
        names = ("uniform", "unigram", "bigram")
        baselines[name] = {n: b / num_bytes for n, b in zip(names, bits, strict=True)}
    return baselines


def validation_labels(packed: list[PackedDataset]) -> Labels:
    """Return the labels that validation reads, using the same collate."""
    parts = []
    for dataset in packed:
        rows = [row for row, _ in dataset.rows(DataPosition())]
        for begin in range(0, len(rows), 64):
            batch = dataset.collate(rows[begin : begin + 64], len(rows[begin : begin + 64]))
            under_loss = batch.labels != IGNORE_INDEX
            parts.append((batch.input_ids[under_loss].numpy(), batch.labels[under_loss].numpy()))
    return Labels(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def training_labels(parts: list[tuple[TokenCache, np.ndarray]], limit: int) -> Iterator[Labels]:
    """Yield labels from the selected records block by block, from about `limit` ids."""
    share = min(1.0, limit / sum(len(cache.ids) for cache, _ in parts))
    for cache, selected in parts:
        num_blocks = -(-len(cache.ids) // BLOCK)
        for block in np.linspace(0, num_blocks - 1, max(1, int(share * num_blocks))).astype(int):
            # One more id than labels: the id before the first label.
            begin, end = block * BLOCK, min((block + 1) * BLOCK + 1, len(cache.ids))
            first = np.searchsorted(cache.offsets, begin, "right") - 1
            last = np.searchsorted(cache.offsets, end, "left")
            lengths = np.diff(np.clip(cache.offsets[first : last + 1], begin, end))
            counted = (cache.supervised[begin:end] != 0) & np.repeat(selected[first:last], lengths)
            ids = cache.ids[begin:end].astype(np.int64)
            # The first id of a sequence is never supervised, so no pair spans two sequences.
            yield Labels(ids[:-1][counted[1:]], ids[1:][counted[1:]])


class Counts(NamedTuple):
    """Counts of n-grams over V ids; shapes (V,) except pairs."""

    ids: np.ndarray  # How often each id is a label.
    previous: np.ndarray  # How often each id precedes a label.
    followers: np.ndarray  # Number of different labels after each id.
    pairs: np.ndarray  # previous * V + label for every label, sorted; a V x V table is too large.


def count_pairs(blocks: Iterator[Labels], vocab_size: int) -> Counts:
    """Count labels, and pairs of a label and the id before it."""
    count = functools.partial(np.bincount, minlength=vocab_size)
    # 32 bits where possible: the pairs take most of the memory at startup.
    dtype = np.uint32 if vocab_size**2 <= 2**32 else np.int64
    ids, previous, codes = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64), []
    for labels in blocks:
        ids += count(labels.ids)
        previous += count(labels.previous)
        codes.append((labels.previous * vocab_size + labels.ids).astype(dtype))
    pairs = np.concatenate(codes)
    pairs.sort()
    new = np.ones(len(pairs), bool)
    new[1:] = pairs[1:] != pairs[:-1]
    return Counts(ids, previous, count(pairs[new] // vocab_size), pairs)


def ngram_bits(counts: Counts, labels: Labels) -> tuple[float, float]:
    """Return the total bits of the labels under the unigram and the bigram model.

    Unigram: p(b) = (c(b) + 1) / (N + V). Bigram: p(b|a) = (c(ab) + t p(b)) / (c(a) + t), where t is
    the number of different labels after a; p(b) if t is 0.
    """
    vocab_size = len(counts.ids)
    pairs, times = np.unique(labels.previous * vocab_size + labels.ids, return_counts=True)
    previous, ids = pairs // vocab_size, pairs % vocab_size
    unigram = (counts.ids[ids] + 1) / (counts.ids.sum() + vocab_size)
    codes = pairs.astype(counts.pairs.dtype)  # Otherwise NumPy widens all of counts.pairs.
    left, right = (np.searchsorted(counts.pairs, codes, side) for side in ("left", "right"))
    total = np.maximum(counts.previous[previous], 1)  # Avoids 0 / 0 if nothing follows.
    followers = counts.followers[previous]
    bigram = (right - left + followers * unigram) / (total + followers)
    bigram = np.where(followers > 0, bigram, unigram)
    return float(-(times * np.log2(unigram)).sum()), float(-(times * np.log2(bigram)).sum())
