"""Tests for the vocabulary: its ids, its merge boundaries and its training data."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tokenizer.bpe import SPECIAL_TOKENS
from tools.train_tokenizer import byte_count, bytes_per_token, main, read_texts, shares, train

ROOT = Path(__file__).resolve().parents[2]
TEXT = [
    "你好，世界。今天是2024年。\n\n很好！",
    "Hello, world. I've seen 12345 things.\n  - one\n  - two\n",
    "assistant user system",
]


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    bpe = train(iter(TEXT * 30), 400)
    bpe.encode_special_tokens = True
    return bpe


@pytest.fixture(scope="module")
def committed() -> Tokenizer:
    bpe = Tokenizer.from_file(str(ROOT / "tokenizer" / "tokenizer.json"))
    bpe.encode_special_tokens = True
    return bpe


@pytest.mark.parametrize("which", ["small", "committed"])
def test_special_tokens_have_the_first_ids_in_order(
    which: str, request: pytest.FixtureRequest
) -> None:
    bpe: Tokenizer = request.getfixturevalue(which)
    assert len(SPECIAL_TOKENS) == 36
    added = bpe.get_added_tokens_decoder()
    assert [added[i].content for i in range(36)] == list(SPECIAL_TOKENS)
    assert len(added) == 36 and all(token.special for token in added.values())


@pytest.mark.parametrize("which", ["small", "committed"])
def test_decoding_restores_every_text(which: str, request: pytest.FixtureRequest) -> None:
    bpe: Tokenizer = request.getfixturevalue(which)
    ascii_signs = "".join(map(chr, range(32, 127)))
    signs = "e\u0301 \U0001f600 \t\r\n \u3000 <|im_start|><think>\x00" + ascii_signs
    for text in (*TEXT, signs, "", " ", "\n\n\n"):
        ids = bpe.encode(text, add_special_tokens=False).ids
        assert bpe.decode(ids, skip_special_tokens=False) == text
        assert not ids or min(ids) >= len(SPECIAL_TOKENS), "a special token was parsed"


@given(text=st.text() | st.lists(st.sampled_from([*"\r\n .。 -a中1", "\n\n"])).map("".join))
def test_roles_never_merge_with_the_text(small: Tokenizer, committed: Tokenizer, text: str) -> None:
    """The loss mask requires that "role + newline" never merges with the text that follows."""
    for bpe in (small, committed):
        for role in ("system\n", "user\n", "assistant\n"):
            parts = bpe.encode_batch([role + text, role, text], add_special_tokens=False)
            assert parts[0].ids == parts[1].ids + parts[2].ids, role


def test_no_token_has_two_newlines(committed: Tokenizer) -> None:
    """Where the pre-tokenizers of other programs keep two in a piece, the ids are the same."""
    assert any("Ċ" in token for token in committed.get_vocab())
    assert not [token for token in committed.get_vocab() if token.count("Ċ") > 1]


def test_digits_are_never_merged(committed: Tokenizer) -> None:
    assert len(committed.encode("1234567890").ids) == 10
    texts = set(committed.get_vocab()) - set(SPECIAL_TOKENS)
    assert not [text for text in texts if len(text) > 1 and re.search("[0-9]", text)]


def test_the_committed_vocabulary_has_6400_entries(committed: Tokenizer) -> None:
    assert committed.get_vocab_size() == 6_400


@pytest.mark.parametrize(("language", "minimum"), [("zh", 3.58), ("en", 3.49)])
def test_the_committed_vocabulary_compresses_held_out_text(
    committed: Tokenizer, language: str, minimum: float
) -> None:
    """The 6,400-entry vocabulary of minimind reaches 3.54 and 3.21 on these rows."""
    path = ROOT / f"dataset/sample/val/pretrain/alpaca_{language}.jsonl"
    if not path.exists():
        pytest.skip("needs the sample: python -m tools.prepare_data")
    rows = path.read_text(encoding="utf-8").splitlines()
    assert bytes_per_token(committed, [json.loads(row)["text"] for row in rows]) >= minimum


# ---- the program ----------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": f"{text} {n}"}) for n in range(100) for text in TEXT]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_an_existing_vocabulary_is_only_replaced_with_force(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data", str(data), "--vocab-size", "350", "--out", str(tmp_path / "made")]
    assert main(command) == 0
    assert "bytes per token" in capsys.readouterr().out
    first = (tmp_path / "made" / "tokenizer.json").read_bytes()
    assert main(command) == 1
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert (tmp_path / "made" / "tokenizer.json").read_bytes() == first, "not deterministic"
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not json\n", "not JSON"),
        ("[1]\n", "a JSON array"),
        ('{"body": "x"}\n', "not pretrain data"),
    ],
)
def test_the_error_names_a_broken_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: str
) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "good"}\n' + content)
    assert main(["--data", str(path), "--out", str(tmp_path / "made")]) == 1
    err = capsys.readouterr().err
    assert words in err and "broken.jsonl, line 2: " in err
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["gbk.txt", "gbk.jsonl"])
def test_the_error_names_a_file_with_the_wrong_encoding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = tmp_path / name
    rows = (
        ["in ASCII.", "今天天气很好"]
        if name.endswith("txt")
        else ['{"text": "one"}', '{"text": "你好"}']
    )
    path.write_bytes("\n".join(rows).encode("gb18030"))
    assert main(["--data", str(path), "--out", str(tmp_path / "made")]) == 1
    err = capsys.readouterr().err
    assert f"{name}, line 2: not UTF-8" in err and "iconv -f gb18030" in err
    assert not (tmp_path / "made").exists()


def test_a_missing_file_or_a_tiny_vocabulary_is_an_error(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", str(tmp_path / "none.jsonl"), "--out", str(tmp_path)]) == 1
    assert "none.jsonl does not exist" in capsys.readouterr().err
    assert main(["--data", str(data), "--vocab-size", "99", "--out", str(tmp_path)]) == 1
    assert "need 292" in capsys.readouterr().err


PAIR = {"role": "user", "content": "five"}, {"role": "assistant", "content": "six"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "one two"}, "one two"),
        ({"conversations": [{"from": "human", "value": "two"}, {"from": "gpt", "value": "three"}]},
         "two|three"),
        ({"messages": [{"role": "user", "content": "four"},
                       {"role": "assistant", "content": "x", "reasoning_content": "why"}]},
         "four|\nwhy\n|\n\nx"),
        ({"chosen": PAIR, "rejected": [PAIR[0], {**PAIR[1], "content": "seven"}]},
         "five|six|seven"),
        ({"prompt": "question", "chosen": "six", "rejected": "seven"}, "question|six|seven"),
    ],
)  # fmt: skip
def test_rows_of_all_stages_are_read(tmp_path: Path, row: dict, expected: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + json.dumps(row) + "\n\n", encoding="utf-8")
    assert "|".join(read_texts([path], 10**6)) == expected


GOLDEN = sorted(
    path
    for path in (ROOT / "tests" / "golden").iterdir()
    if path.stem not in ("expected", "unpaired")
)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_every_file_that_a_stage_trains_on_is_read(tmp_path: Path, path: Path) -> None:
    command = ["--data", str(path), "--vocab-size", "300", "--out", str(tmp_path)]
    assert main(command) == 0


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".parquet"])
def test_compressed_files_are_read(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"text {number}"} for number in range(50)]
    lines = "\n".join(map(json.dumps, rows)).encode()
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(lines) if suffix == ".gz" else zstandard.compress(lines))
    assert list(read_texts([path], 10**6)) == [row["text"] for row in rows]


@pytest.mark.parametrize("sign", ["a", "中", " ", "!", "\n", "1"])
def test_a_long_line_of_equal_characters_does_not_stall(tmp_path: Path, sign: str) -> None:
    """It would take an hour if the time grew with the square of the length."""
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": f"x{sign * 1_000_000}x"}), encoding="utf-8")
    command = [sys.executable, "-m", "tools.train_tokenizer", "--data", str(path)]
    command += ["--vocab-size", "320", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, capture_output=True)
    bpe = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert bpe.decode(bpe.encode("x" + sign * 5_000).ids) == "x" + sign * 5_000


def test_plain_text_keeps_its_newlines(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("eight\nnine\n", encoding="utf-8")
    assert list(read_texts([tmp_path / "plain.txt"], 10**6)) == ["eight\nnine"]


def test_a_file_given_twice_counts_twice(data: Path) -> None:
    once = list(read_texts([data], 10**6))
    assert list(read_texts([data, data], 10**6)) == once + once


def test_the_sample_is_spread_evenly_over_files_and_within_each_file(tmp_path: Path) -> None:
    assert shares([10, 1_000, 2_000], 810) == [10, 400, 400]
    assert shares([10, 20], 1_000) == [10, 20]
    big = tmp_path / "big.jsonl"
    with big.open("w") as stream:
        for number in range(60_000):
            stream.write(json.dumps({"text": f"{number:06d}" + "x" * 90}) + "\n")
    numbers = [int(text[:6]) for text in read_texts([big], 3_000_000)]
    assert sum(1 for _ in numbers) * 109 == pytest.approx(3_000_000, rel=0.01)
    assert len(set(numbers)) == len(numbers)
    assert numbers[0] == 0 and max(numbers) > 40_000, "sampled only the beginning"


@pytest.mark.parametrize(
    ("text", "count"), [("300", 300), ("500KB", 500_000), ("1.5gb", 1_500_000_000)]
)
def test_byte_counts_are_parsed(text: str, count: int) -> None:
    assert byte_count(text) == count
