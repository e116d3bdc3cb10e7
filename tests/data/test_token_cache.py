"""Tests that ids on disk are wide enough for the vocabulary, and unchanged when read again."""

from __future__ import annotations

import json
import os
from itertools import count, islice, product

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dataset import DataConfig, load_datasets
from tokenizer.adopt import adopt
from tokenizer.bpe import REQUIRED_TOKENS
from trainlib.data.batch import IGNORE_INDEX
from trainlib.data.encode import encode_document
from trainlib.data.epoch_plan import DataPosition
from trainlib.data.formats import Record
from trainlib.data.token_cache import build_cache

PAIRS = ["".join(pair) for pair in product("abcdefghijklmnopqrstuvwxyz", repeat=2)]


def large_vocabulary(folder, size):
    """Build an untrained byte-level BPE with `size` entries: bytes, letter pairs, letter quads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    num_quads = size - len(REQUIRED_TOKENS) - len(alphabet) - len(PAIRS)
    quads = islice(product(PAIRS, repeat=2), num_quads)
    merges = [*map(tuple, PAIRS), *quads]
    entries = [*alphabet, *("".join(merge) for merge in merges)]
    vocab = {entry: id_ for id_, entry in enumerate(entries)}
    bpe = Tokenizer(models.BPE(vocab, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    return adopt(folder), entries


@pytest.mark.parametrize(
    ("size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32), (71_000, np.uint32)]
)
def test_ids_are_as_wide_as_the_vocabulary_needs(size, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "cache"))
    tokenizer, entries = large_vocabulary(tmp_path / "large", size)
    assert tokenizer.vocab_size == size
    assert (
        tokenizer.end_of_text_id == size - 3
    )  # The highest id in the data; it occurs in every document.
    texts = [" ".join(entries[i::9000]) for i in range(len(entries) - 50, len(entries))]
    texts += [f"{entries[-1]} 中文 {i}" for i in range(50)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for _ in range(2):  # First built, then read from disk.
        cache = build_cache(path, "pretrain", tokenizer)
        assert cache.ids.dtype == dtype
        documents = np.split(np.asarray(cache.ids), cache.offsets[1:-1])
        for text, ids in zip(texts, documents, strict=True):
            assert ids.tolist() == encode_document(tokenizer, Record(text, "", path, 1))[0].ids
            assert tokenizer.decode(ids.tolist()) == text
    data = load_datasets(DataConfig(files=(str(path),)), "pretrain", tokenizer, 64, 0)
    batch = data.train.collate(
        [row for row, _ in data.train.rows(DataPosition())], data.train.num_rows()
    )
    assert int(batch.input_ids.max()) == size - 3
    labels = batch.labels[batch.labels != IGNORE_INDEX].tolist()
    assert batch.num_bytes == len(tokenizer.decode_bytes(labels)) > 0


def test_the_key_depends_on_the_content_but_not_on_the_mtime(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"

    def key(*texts):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        os.utime(path, ns=(0, next(times)))
        return build_cache(path, "pretrain", tokenizer).key

    times = count(1)
    first = key("one", "two")
    assert key("one", "two") == first  # A new mtime gives a new cache with the same key.
    assert len(list((tmp_path / "cache/tokens").iterdir())) == 2
    assert len({first, key("two", "one"), key("one", "tw0"), key("one", "two", "three")}) == 4
