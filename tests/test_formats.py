"""Protects users from bad rows: each is named by file, line and reason, and nothing is written."""

from __future__ import annotations

import json

import pytest

import formats
from dataset import ENCODERS
from token_cache import build_cache, cache_dir
from trainlib.errors import UserError

ASK = {"role": "user", "content": "q"}
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}

BAD = [
    ("pretrain", '{"text": "a"}\n{"text": \n', "line 2: not JSON"),
    ("pretrain", '{"text": "a"}\n[1]\n', "line 2: a JSON list"),
    ("pretrain", '{"text": "a"}\n\n{"txt": "b"}\n', "line 3: not a pretrain row"),
    ("pretrain", '{"text": 7}\n', "line 1: .* must be a string, not int"),
    ("pretrain", '{"text": "\\ud800"}\n', "line 1: .*surrogate"),
    ("pretrain", "\n", "is empty"),
    ("sft", json.dumps({"conversations": [ASK]}), "no assistant message"),
    ("sft", json.dumps({"conversations": [{"role": "bot", "content": "x"}]}), "role 'bot'"),
    ("sft", json.dumps({"conversations": [{"content": "x"}]}), 'message 1 must be .* "role"'),
    ("dpo", json.dumps({"chosen": [ASK, YES], "rejected": [NO]}), "different prompts"),
    ("dpo", json.dumps({"chosen": [ASK, YES], "rejected": [ASK, YES]}), "the same answer"),
    ("dpo", json.dumps({"chosen": [ASK, YES]}), "not a dpo row"),
]


@pytest.mark.parametrize(("kind", "content", "message"), BAD)
def test_bad_rows(kind, content, message, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        build_cache(path, kind, tokenizer, ENCODERS[kind])
    assert str(path) in str(caught.value)
    assert not [p for p in cache_dir().rglob("*") if p.is_file()]
    assert path.read_text() == content


def test_bytes_that_are_no_utf8(tmp_path):
    path = tmp_path / "gbk.jsonl"
    path.write_bytes('{"text": "中文"}\n'.encode("gbk"))
    with pytest.raises(UserError, match="line 1: not UTF-8"):
        list(formats.read_records(path, "pretrain"))


def test_bom_and_windows_line_ends(tmp_path):
    path = tmp_path / "w.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [r.value for r in formats.read_records(path, "pretrain")] == ["a", "b"]
    assert formats.detect(path).kind == "pretrain"


def test_a_cache_is_made_once_and_again_when_the_file_changes(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    first = build_cache(path, "pretrain", tokenizer, ENCODERS["pretrain"])

    def never(*_):
        raise AssertionError("the file was tokenized again")

    assert build_cache(path, "pretrain", tokenizer, never).key == first.key
    path.write_text('{"text": "b"}\n')
    assert build_cache(path, "pretrain", tokenizer, ENCODERS["pretrain"]).key != first.key
