"""Tests that baselines equal explicit counts over the tokens and bytes that val/loss reads."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset import DataConfig, load_datasets
from trainlib.core.distributed import SINGLE_PROCESS
from trainlib.core.hardware import Hardware
from trainlib.data.token_cache import TokenCache
from trainlib.engine.control import Clock, Control
from trainlib.engine.validation import validate
from trainlib.evaluation import baselines
from trainlib.evaluation.baselines import (
    Labels,
    count_pairs,
    ngram_bits,
    training_labels,
    with_baselines,
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path, tokenizer, monkeypatch):
    """Return a function that loads datasets of either kind, with a separate cache."""
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "cache"))
    texts = [f"第{i}条 row {i} of {i % 7} goes on. " * (i % 5 + 1) for i in range(60)]

    def load(kind, **settings):
        rows = [{"text": text} for text in texts]
        if kind == "sft":
            turns = [("user", f"question {i} " * 3) for i in range(60)]
            rows = [
                {"conversations": [{"role": "user", "content": question},
                                   {"role": "assistant", "content": text}]}
                for (_, question), text in zip(turns, texts, strict=True)
            ]  # fmt: skip
        files = write(tmp_path / "train.jsonl", rows[:50])
        val = (write(tmp_path / "a.jsonl", rows[50:55]), write(tmp_path / "b.jsonl", rows[55:]))
        config = DataConfig(files=(files,), **{"val_files": val, **settings})
        return load_datasets(config, kind, tokenizer, 256, 0)

    return load


def explicit_bits(train, val, vocab_size):
    """Return the unigram and bigram bits of (previous, label) pairs, one pair at a time."""
    ids, pairs = Counter(b for _, b in train), Counter(train)
    previous = Counter(a for a, _ in train)
    followers = Counter(a for a, _ in pairs)
    unigram = bigram = 0.0
    for a, b in val:
        p = (ids[b] + 1) / (len(train) + vocab_size)
        unigram -= math.log2(p)
        if previous[a]:
            p = (pairs[a, b] + followers[a] * p) / (previous[a] + followers[a])
        bigram -= math.log2(p)
    return unigram, bigram


def pairs_of(packed):
    """Return the supervised pairs, document by document."""
    found = []
    for cache, selected in packed.parts:
        for record in np.flatnonzero(selected):
            span = slice(cache.offsets[record], cache.offsets[record + 1])
            ids, supervised = cache.ids[span].tolist(), cache.supervised[span].tolist()
            found += [(a, b) for a, b, m in zip(ids, ids[1:], supervised[1:], strict=False) if m]
    return found


def test_baselines_of_a_tiny_corpus_equal_values_computed_manually():
    # Labels after 0: 1, 1, 2; after 1: 2. Unigram over V = 4: p(1) = 3/8, p(2) = 3/8, p(3) = 1/8.
    # p(1|0) = (2 + 2 * 3/8) / (3 + 2), p(2|1) = (1 + 3/8) / 2, and nothing follows 3.
    train = Labels(np.array([0, 0, 0, 1]), np.array([1, 1, 2, 2]))
    val = Labels(np.array([0, 1, 3]), np.array([1, 2, 3]))
    unigram, bigram = ngram_bits(count_pairs(iter([train]), 4), val)
    assert unigram == pytest.approx(-math.log2(3 / 8 * 3 / 8 * 1 / 8))
    assert bigram == pytest.approx(-math.log2(2.75 / 5 * 1.375 / 2 * 1 / 8))


def test_bigram_probabilities_sum_to_one_over_a_large_vocabulary():
    vocab_size, rng = 70_000, np.random.default_rng(0)
    train = Labels(rng.integers(0, vocab_size, 3000), rng.integers(0, vocab_size, 3000))
    counts = count_pairs(iter([train]), vocab_size)
    everything = np.arange(vocab_size)
    for previous in (int(train.previous[0]), vocab_size - 1):
        p = [
            2 ** -ngram_bits(counts, Labels(np.array([previous]), np.array([label])))[1]
            for label in (*train.ids[train.previous == previous], 5)
        ]
        assert min(p) > 0
        labels = Labels(np.full(vocab_size, previous), everything)
        bits = -np.log2(probabilities(counts, labels))
        assert (2**-bits).sum() == pytest.approx(1)
        assert ngram_bits(counts, labels)[1] == pytest.approx(bits.sum())


def probabilities(counts, labels):
    """Return the bigram probability of each label, from the definition of Counts."""
    previous = int(labels.previous[0])
    unigram, size = (counts.ids + 1) / (counts.ids.sum() + len(counts.ids)), len(counts.ids)
    low, high = np.searchsorted(counts.pairs, [previous * size, (previous + 1) * size])
    observed = np.bincount(counts.pairs[low:high] - previous * size, minlength=size)
    if not observed.sum():
        return unigram
    distinct = np.count_nonzero(observed)
    return (observed + distinct * unigram) / (observed.sum() + distinct)


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
@pytest.mark.parametrize("settings", [{}, {"val_files": (), "val_fraction": 0.2}])
def test_baselines_of_files_equal_explicit_counts(kind, settings, data, tokenizer):
    datasets = with_baselines(data(kind, **settings), tokenizer)
    train = pairs_of(datasets.train)
    val = [pair for packed in datasets.val.values() for pair in pairs_of(packed)]
    num_bytes = sum(len(tokenizer.id_to_bytes[label]) for _, label in val)
    unigram, bigram = explicit_bits(train, val, tokenizer.vocab_size)
    found = datasets.baselines
    assert found["uniform"] == pytest.approx(len(val) * math.log2(6400) / num_bytes)
    assert found["unigram"] == pytest.approx(unigram / num_bytes)
    assert found["bigram"] == pytest.approx(bigram / num_bytes)
    assert found["bigram"] < found["unigram"] < found["uniform"]


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
@pytest.mark.parametrize("max_rows", [0, 1])
def test_a_uniform_model_scores_the_uniform_baseline(kind, max_rows, data, tokenizer):
    """Zero logits score exactly the baseline, so it uses the tokens and bytes of validate()."""
    from train import loss_fn

    class Uniform(torch.nn.Module):
        def forward(self, input_ids, select, **_):
            return torch.zeros(*input_ids.shape, tokenizer.vocab_size)[select]

    datasets = with_baselines(data(kind, val_max_rows=max_rows), tokenizer)
    hardware = Hardware(torch.device("cpu"), "fp32", "masked", False, 3)
    control = Control(Path(), Clock(), SINGLE_PROCESS)
    run = SimpleNamespace(hardware=hardware, distributed=SINGLE_PROCESS, control=control)
    training = SimpleNamespace(run=run, model=Uniform(), datasets=datasets, val_batches=[])
    metrics = validate(training, loss_fn)  # type: ignore[arg-type]
    assert metrics["bits_per_byte"] == pytest.approx(datasets.baselines["uniform"], rel=1e-6)


def test_blocks_neither_lose_nor_repeat_labels(monkeypatch):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 30, 200)
    offsets = np.concatenate([[0], lengths.cumsum()])
    ids = rng.integers(0, 50, offsets[-1]).astype(np.uint16)
    supervised = (rng.random(len(ids)) < 0.7).astype(np.uint8)
    supervised[offsets[:-1]] = 0
    empty = np.zeros(0)
    cache = TokenCache(None, "", ids, supervised, offsets, empty, empty, empty, [])  # type: ignore
    selected = rng.random(200) < 0.8
    expected = pairs_of(SimpleNamespace(parts=[(cache, selected)]))
    for block in (7, 64, 1 << 16):
        monkeypatch.setattr(baselines, "BLOCK", block)
        blocks = list(training_labels([(cache, selected)], 10**6))
        assert [pair for b in blocks for pair in zip(*map(list, b), strict=True)] == expected
    monkeypatch.setattr(baselines, "BLOCK", 16)
    sample = [pair for b in training_labels([(cache, selected)], 800)
              for pair in zip(*map(list, b), strict=True)]  # fmt: skip
    assert 0.1 * len(expected) < len(sample) < 0.5 * len(expected) and set(sample) <= set(expected)
