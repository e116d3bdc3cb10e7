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
from trainlib.core import files
from trainlib.data import packing, token_cache, tokenize_files
from trainlib.data.batch import IGNORE_INDEX
from trainlib.data.encode import encode_document
from trainlib.data.epoch_plan import DataPosition
from trainlib.data.formats import Record
from trainlib.data.packing import PackedDataset
from trainlib.data.token_cache import build_cache, counted_tokens

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
            [sequence] = encode_document(tokenizer, Record(text, "", path, 1))
            assert ids.tolist() == sequence.ids.tolist()
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


def rows_file(path, n=120):
    path.write_text("".join(json.dumps({"text": f"row {i} 文字"}) + "\n" for i in range(n)))
    return path


def content(cache):
    return {p.name: p.read_bytes() for p in cache.folder.iterdir() if p.name != "meta.json"}


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def be_a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "one bit": flip,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "deep": lambda path: path.write_text("[" * 100_000),
    **{f"JSON {text}": lambda path, text=text: path.write_text(text)
       for text in ("[]", "{}", "1", "null", '{"sizes": 1, "files": {}, "digest": ""}')},
    "gone": lambda path: path.unlink(),
    "a folder": be_a_folder,
}  # fmt: skip


@pytest.fixture
def cached(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "cache"))
    path = rows_file(tmp_path / "a.jsonl")
    return path, build_cache(path, "pretrain", tokenizer)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["meta.json", "ids.bin", "offsets.bin", "lines.bin"])
def test_a_damaged_cache_is_rebuilt_with_one_line(name, damage, cached, tokenizer, caplog):
    path, cache = cached
    expected = content(cache)
    DAMAGE[damage](cache.folder / name)
    assert counted_tokens(path, "pretrain", 64) == 0
    caplog.clear()
    again = build_cache(path, "pretrain", tokenizer)
    assert content(again) == expected and again.key == cache.key
    lines = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(lines) == 1 and "is damaged and is rebuilt" in lines[0]
    assert len(list(cache.folder.parent.iterdir())) == 1


def test_a_file_in_the_place_of_a_cache_is_replaced(cached, tokenizer):
    path, cache = cached
    expected = content(cache)
    for name in (cache.folder, cache.folder.with_name(f".making-{cache.folder.name}")):
        files.remove(cache.folder)
        name.write_text("not a folder")
        assert content(build_cache(path, "pretrain", tokenizer)) == expected


def test_damage_that_keeps_size_and_time_is_found_by_verify(cached, tokenizer, caplog):
    path, cache = cached
    expected, ids = content(cache), cache.folder / "ids.bin"
    status = ids.stat()
    flip(ids)
    os.utime(ids, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert content(build_cache(path, "pretrain", tokenizer)) != expected
    assert content(build_cache(path, "pretrain", tokenizer, verify=True)) == expected
    assert "ids.bin has changed" in caplog.text


def test_a_copied_cache_is_compared_once(cached, tokenizer, monkeypatch):
    path, cache = cached
    compared = []
    real = files.digest_of
    monkeypatch.setattr(files, "digest_of", lambda p, d: compared.append(p.name) or real(p, d))
    os.utime(cache.folder / "ids.bin")
    for _ in range(2):
        assert build_cache(path, "pretrain", tokenizer).key == cache.key
    assert compared == ["ids.bin"]


@pytest.mark.parametrize(("name", "damage"), [
    *(("progress.json", damage) for damage in DAMAGE),
    *(("ids.bin", damage) for damage in ("empty", "cut", "gone", "a folder")),
])  # fmt: skip
def test_a_damaged_unfinished_cache_starts_again(
    name, damage, tmp_path, tokenizer, monkeypatch, caplog
):
    path = rows_file(tmp_path / "a.jsonl")
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "complete"))
    expected = content(build_cache(path, "pretrain", tokenizer))
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenize_files, "CHUNK_BYTES", 200)
    monkeypatch.setattr(token_cache, "SAVE_SECONDS", 0)
    real = tokenize_files.tokenize_chunk

    def until_line_60(chunk, task):
        if chunk.items[0].line > 60:
            raise KeyboardInterrupt
        return real(chunk, task)

    monkeypatch.setattr(tokenize_files, "tokenize_chunk", until_line_60)
    with pytest.raises(KeyboardInterrupt):
        build_cache(path, "pretrain", tokenizer)
    monkeypatch.setattr(tokenize_files, "tokenize_chunk", real)
    [partial] = (tmp_path / "cache" / "tokens").glob(".making-*")
    DAMAGE[damage](partial / name)
    assert content(build_cache(path, "pretrain", tokenizer)) == expected
    noticed = [r for r in caplog.records if "tokenization starts again" in r.getMessage()]
    assert len(noticed) == ((name, damage) != ("progress.json", "gone"))


def test_names_of_80_chinese_characters(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "cache"))
    path = rows_file(tmp_path / ("语料" * 40 + ".jsonl"))
    assert build_cache(path, "pretrain", tokenizer).num_records == 120
    assert counted_tokens(path, "pretrain", 64) > 0
    data = load_datasets(DataConfig(files=(str(path),)), "pretrain", tokenizer, 64, 0)
    assert data.train.num_records == 108 and list(data.val) == ["语料" * 40]


@pytest.mark.parametrize("name", ["json", "units.npy", "bounds.npy", "order.npy"])
@pytest.mark.parametrize("damage", [damage for damage in DAMAGE if damage != "a folder"])
def test_a_damaged_plan_is_rebuilt(name, damage, cached, tokenizer, monkeypatch, caplog):
    _, cache = cached
    monkeypatch.setattr(packing, "STORED_UNITS", 0)
    sizes = np.array([len(text) for text in tokenizer.id_to_bytes])

    def plan():
        data = PackedDataset([(cache, np.ones(120, bool))], "pretrain", 64, sizes, 0)
        return [row.tolist() for row, _ in data.rows(DataPosition())]

    fresh = plan()
    [path] = (cache.folder.parents[1] / "plans").glob(f"*.{name}")
    DAMAGE[damage](path)
    assert plan() == fresh
    assert ("is damaged and is rebuilt" in caplog.text) == ((damage, name) != ("gone", "json"))


def test_the_flag_verify_cache_compares_the_digests(cached, run_stage, monkeypatch, capsys):
    path, cache = cached
    words = [f"data.files={path}", "sequence_length=64", "--prepare-only"]
    for flags in ([], ["--verify-cache"]):
        assert run_stage("pretrain", *words, *flags) == 0
        assert ("the digests of its token cache are correct" in capsys.readouterr().out) == bool(
            flags
        )
