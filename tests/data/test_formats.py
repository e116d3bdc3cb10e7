"""Tests that errors for bad rows name file, line and reason, and that nothing is written."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainlib.core.errors import UserError
from trainlib.core.files import cache_dir
from trainlib.data import containers, formats, readers
from trainlib.data.containers import Broken
from trainlib.data.encode import ENCODERS
from trainlib.data.findings import Counts
from trainlib.data.token_cache import build_cache

USER = {"role": "user", "content": "q"}
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}

BAD = [
    ("pretrain", '{"text": "a"}\n{"text": \n', "line 2: not JSON"),
    ("pretrain", '{"text": "a"}\n[1]\n', "line 2: a JSON array"),
    ("pretrain", '{"text": "a"}\n\n{"txt": "b"}\n', "line 3: not pretrain data"),
    ("pretrain", '{"text": 7}\n', "line 1: .* must be a string, not number"),
    ("pretrain", '{"text": "\\ud800"}\n', "line 1: .*surrogate"),
    ("pretrain", "\n", "is empty"),
    ("sft", json.dumps({"conversations": [{"role": "critic", "content": "x"}]}), "role 'critic'"),
    ("sft", json.dumps({"conversations": [{"content": "x"}]}), 'message 1 must be .* "role"'),
    ("dpo", json.dumps({"chosen": [USER, YES], "rejected": [NO]}), "different prompts"),
    (
        "dpo",
        json.dumps({"prompt": "q", "completion": "a", "label": True}),
        "no stage trains on.*pairs",
    ),
    ("dpo", json.dumps({"chosen": [USER, YES]}), "unknown row format"),
]


@pytest.mark.parametrize(("kind", "content", "message"), BAD)
def test_bad_rows_raise_user_errors(kind, content, message, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        build_cache(path, kind, tokenizer)
    assert str(path) in str(caught.value)
    assert not [p for p in cache_dir().rglob("*") if p.is_file()]
    assert path.read_text() == content


def test_bytes_that_are_not_utf8_are_reported_with_a_fix_for_gbk(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "cache"))
    rows = {
        "gbk.jsonl": '{"text": "one"}\n{"text": "中文"}\n', "first.jsonl": '{"text": "中文"}\n',
        "gbk.txt": "one\n今天天气很好\n", "gbk.json": '[{"text": "中文"}]',
        "gbk.csv": "text,source\n中文,a\n",
    }  # fmt: skip
    for name, text in rows.items():
        path = tmp_path / name
        path.write_bytes(text.encode("gbk"))
        with pytest.raises(UserError, match=f"{name}, line .*iconv -f gb18030") as caught:
            build_cache(path, "pretrain", tokenizer)
        assert "Known" not in str(caught.value) and "on_error" not in str(caught.value)
    for raw in ('{"text": "déjà"}'.encode("latin-1"), '{"text": "中文"}'.encode()[:-4] + b'"}'):
        path.write_bytes(raw)
        found = next(
            formats.check_items([(1, raw)], path, "pretrain", formats.ReadOptions(), Counts())
        )
        assert found[1].reason.startswith("not UTF-8") and "GBK" not in found[1].reason


def test_a_bom_and_windows_line_endings_are_accepted(tmp_path):
    path = tmp_path / "w.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [row["value"] for row in read(path)["rows"]] == ["a", "b"]
    assert formats.detect(path).format.kind == "pretrain"


def test_a_cache_is_built_once_and_rebuilt_when_the_file_changes(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    first = build_cache(path, "pretrain", tokenizer)

    def fail(*_):
        raise AssertionError("the file was tokenized again")

    with monkeypatch.context() as patch:
        patch.setitem(ENCODERS, "pretrain", fail)
        assert build_cache(path, "pretrain", tokenizer).key == first.key
    path.write_text('{"text": "b"}\n')
    assert build_cache(path, "pretrain", tokenizer).key != first.key


# ---- every known format --------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
quick = settings(max_examples=40, deadline=None, database=None, derandomize=True)


def read(path, name="auto", **options):
    """Return the content of a file in the format of expected.json."""
    found = formats.detect(path, name=name)
    options, kind = formats.ReadOptions(name, **options), found.format.kind
    rows = []
    for line, found_rows in formats.check_items(
        found.source.items(), path, kind, options, Counts()
    ):
        if isinstance(found_rows, formats.Broken):
            rows.append({"line": line, "broken": found_rows.reason})
            continue
        rows += [{"line": line, "value": row.value} for row in found_rows] or [{"line": line}]
    rows = json.loads(json.dumps(rows))  # Turns a pair from a tuple into a list.
    return {"format": found.format.name, "kind": found.format.kind,
            "container": found.source.container, "rows": rows}  # fmt: skip


def test_every_format_has_a_golden_file():
    assert {row["format"] for row in EXPECTED.values()} == {f.name for f in formats.FORMATS}
    assert {p.name for p in GOLDEN.iterdir()} == {*EXPECTED, "expected.json"}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_golden_files_are_read_as_expected(name):
    assert read(GOLDEN / name) == EXPECTED[name]


@pytest.mark.parametrize("name", ["minimind.jsonl", "alpaca.json", "text.csv", "plain.txt"])
@pytest.mark.parametrize("end", ["lf", "crlf", "bom"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compression_bom_and_line_endings_do_not_change_the_rows(name, end, suffix, tmp_path):
    raw = (GOLDEN / name).read_bytes()
    if end == "crlf" and name != "text.csv":
        raw = raw.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    if end == "bom":
        raw = readers.BOM + raw
    if suffix == ".gz":
        raw = gzip.compress(raw[:50]) + gzip.compress(raw[50:])
    elif suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        raw = zstandard.compress(raw[:50]) + zstandard.compress(raw[50:])
    path = tmp_path / (name + suffix)
    path.write_bytes(raw)
    assert read(path) == EXPECTED[name]


@pytest.mark.parametrize("name", ["minimind.jsonl", "sharegpt.json", "minimind_dpo.jsonl"])
def test_parquet_gives_the_same_rows_as_json(name, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [readers.parse(item.content) for item in readers.Source(GOLDEN / name).items()]
    if name == "minimind.jsonl":
        rows = rows[:2]  # A Parquet column has one type, but tools is a list in later rows.
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1)
    values = [row["value"] for row in read(path)["rows"]]
    assert values == [row["value"] for row in EXPECTED[name]["rows"][: len(rows)]]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged Parquet"):
        read(path)


def test_a_missing_package_is_reported_with_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for name, start in (("a.zst", b"\x28\xb5\x2f\xfd"), ("b.parquet", b"PAR1")):
        path = tmp_path / name
        path.write_bytes(start + bytes(20))
        with pytest.raises(UserError, match=r"pip install -r requirements-data\.txt"):
            formats.detect(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_stream_is_an_error(suffix, tmp_path):
    raw = "".join(json.dumps({"text": f"row {i} {i * i}"}) + "\n" for i in range(9999)).encode()
    if suffix == ".gz":
        raw = gzip.compress(raw)
    else:
        raw = pytest.importorskip("zstandard").compress(raw)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(raw[:-20])
    with pytest.raises(UserError, match="damaged or truncated"):
        read(path)


def test_instruction_and_input_of_wyf3_rows_are_joined_directly():
    value = read(GOLDEN / "wyf3_sft.jsonl", alpaca_join="")["rows"][0]["value"]
    assert value[0]["content"] == "你好吗"


def test_detection_can_be_overridden(tmp_path):
    path = tmp_path / "both.jsonl"
    path.write_text('{"text": "t", "instruction": "i", "output": "o"}\n')
    assert formats.detect(path).format.name == "alpaca"
    assert formats.detect(path, kind="pretrain").format.name == "text"
    assert formats.detect(path, name="text").format.name == "text"
    assert read(path, "txt")["rows"][0]["value"].startswith('{"text"')
    assert "data.format" in formats.detect(path, name="txt").reason


def test_an_array_continues_after_a_broken_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a", "m": [{}]},\n{"text": b, "m": [{}, {}]},\n{"text": "c"},\n7]')
    rows = read(path)["rows"]
    assert [row["line"] for row in rows] == [1, 2, 3, 4]
    assert [row.get("value") for row in rows] == ["a", None, "c", None]
    path.write_text('[{"text": "a"},\n{"text": "b"')
    assert "value" in read(path)["rows"][0] and "broken" in read(path)["rows"][1]


def test_a_long_text_becomes_several_documents_and_loses_nothing(tmp_path):
    path = tmp_path / "book.txt"
    text = "".join(f"行 {i} of the book\n" + "\n" * (i % 40 == 0) for i in range(9000))
    text += "尾" * 20000
    path.write_text(text)
    values = [row["value"] for row in read(path)["rows"]]
    assert "".join(values).replace("\n", "") == text.replace("\n", "")
    assert len(values) > 10 and max(len(v.encode()) for v in values) <= 4 + 2 * (16 << 10)


starts = [b'[{"text": "a"}', b'{"text": ', b"a,b\n", b"\x1f\x8b", b"PAR1", b"[[", b""]


@settings(quick, max_examples=150)
@given(
    raw=st.tuples(st.sampled_from(starts), st.binary(max_size=80)).map(b"".join),
    suffix=st.sampled_from([".jsonl", ".json", ".txt", ".csv", ""]),
)
def test_any_bytes_give_rows_or_a_user_error(tmp_path_factory, raw, suffix):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(raw)
    try:
        found = formats.detect(path)
        items = list(found.source.items())
    except UserError:
        return
    checked = list(
        formats.check_items(items, path, found.format.kind, formats.ReadOptions(), Counts())
    )
    assert [line for line, _ in checked] == [item.line for item in items]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "name", "x"]), inner)
    ),
    max_leaves=6,
)
known_rows = st.dictionaries(
    st.sampled_from([
        "text", "messages", "conversations", "chosen", "rejected", "prompt", "completion", "tools",
        "instruction", "input", "output", "history", "system", "q", "a", "label",
    ]),
    json_values, min_size=1,
)  # fmt: skip


@quick
@given(rows=st.lists(known_rows, min_size=1, max_size=4), indent=st.sampled_from([None, 1]))
def test_lines_and_arrays_give_the_same_rows_and_errors(tmp_path_factory, rows, indent):
    folder = tmp_path_factory.getbasetemp()
    lines, array = folder / "any_rows.jsonl", folder / "any_rows.json"
    lines.write_text("\n".join(map(json.dumps, rows)))
    array.write_text(json.dumps(rows, indent=indent))
    try:
        found = formats.detect(lines)
    except UserError:
        with pytest.raises(UserError):
            formats.detect(array)
        return
    one, other = read(lines), read(array)
    assert len(one["rows"]) == len(rows) == len(other["rows"])
    for row in one["rows"] + other["rows"]:
        row.pop("line")
    assert one == {**other, "container": "jsonl"} and found.format.name == one["format"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "a.csv"])
@pytest.mark.parametrize(("content", "problem"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "git-lfs pointer"),
    (b"<!DOCTYPE html>\n<html><body>404</body></html>", "is an HTML page"),
    (b"\n \n", "is empty"), (b"", "is empty"),
])  # fmt: skip
def test_files_that_a_failed_download_leaves_are_named(name, content, problem, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name} .*{problem}"):
        formats.detect(path)
    if problem == "is an HTML page" and name == "a.txt":
        assert formats.detect(path, name="txt").format.name == "text"


def test_a_parquet_date_out_of_range_is_an_error_with_its_row(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    when = pyarrow.array([0, 2**61], pyarrow.timestamp("us"))
    table = pyarrow.table({"text": ["a", "b"], "when": when})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match="after row 0: a value that cannot be read.*Cast the column"
    ):
        list(readers.Source(tmp_path / "a.parquet").items())


# ---- limits --------------------------------------------------------------------------------------


def broken(path, **options):
    """Return the reasons why rows of a file are broken."""
    items = readers.Source(path, **options).items()
    return [item.content.reason for item in items if isinstance(item.content, Broken)]


def peak_of(command, path):
    """Return by how many bytes the peak memory of a program grows while it reads a file."""
    code = (
        "import pyarrow.parquet, resource, sys, zstandard; from pathlib import Path;"
        "from trainlib.data import readers;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; start = peak();"
        f"path = Path(sys.argv[1]); {command}; print((peak() - start) << 10)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, text=True,
                         capture_output=True, check=True).stdout  # fmt: skip
    return int(out)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_row_over_the_limit_is_broken_and_the_others_are_read(name, tmp_path):
    texts = ["one", "x" * (3 << 20), "two"]
    rows, path = [{"text": text} for text in texts], tmp_path / name
    if name == "a.parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        text = {"a.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
                "a.json": json.dumps(rows), "a.csv": "text\n" + "\n".join(texts)}[name]  # fmt: skip
        path.write_text(text)
    assert broken(path) == []
    [reason] = broken(path, max_row_mb=2)
    assert "longer than 2 MB, the limit of data.max_row_mb" in reason
    rows = [item.content for item in readers.Source(path, max_row_mb=2).items()]
    read = [readers.parse(row) for row in rows if not isinstance(row, Broken)]
    assert [row["text"] for row in read] == ["one", "two"]
    if name == "a.csv":  # The header can be too long too.
        path.write_text("x" * (3 << 20))
        assert "longer than 2 MB" in broken(path, max_row_mb=2)[0]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_nesting_over_the_limit_is_broken(name, tmp_path):
    for depth, accepted in ((200, True), (201, False), (900, False), (100_000, False)):
        value = "[" * (depth - 1) + "]" * (depth - 1)  # The row is one level.
        row = f'{{"text": "a", "more": {value}}}\n'
        path = tmp_path / name
        path.write_text(row if name == "a.jsonl" else f"[{row}]")
        [item] = readers.Source(path).items()
        if accepted:
            assert readers.parse(item.content)["text"] == "a"
        else:
            with pytest.raises(ValueError, match="nested more than 200 levels deep, the limit"):
                readers.parse(item.content)


def test_a_zstd_window_over_the_limit_is_an_error_with_a_command(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    row = json.dumps({"text": "a"}).encode() + b"\n"
    for log, accepted in ((27, True), (28, False), (31, False)):
        parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=True)
        compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        path = tmp_path / "a.jsonl.zst"
        path.write_bytes(compressor.compress(row) + compressor.flush())
        if accepted:
            assert len(list(readers.Source(path).items())) == 1
        else:
            with pytest.raises(UserError, match=r"more than 128 MB, the limit.*zstd -d --long=31"):
                readers.Source(path)


def test_a_zstd_bomb_is_read_in_little_memory(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    compressor = zstandard.ZstdCompressor(level=19).compressobj()
    path = tmp_path / "a.jsonl.zst"
    line = b'{"text": "' + b"a" * (16 << 20) + b'"}\n'
    path.write_bytes(b"".join(compressor.compress(line) for _ in range(80)) + compressor.flush())
    assert path.stat().st_size < 1 << 20
    assert peak_of("print(sum(1 for _ in readers.Source(path).items()), file=sys.stderr)", path) < (
        300 << 20
    )


def test_a_parquet_value_that_all_rows_share_is_read_in_little_memory(tmp_path):
    """A dictionary stores the value once: 3 KB that became 11 GB."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    value = pyarrow.array(["a" * (20 << 20)])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 512, pyarrow.int32()), value)
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd",
                        store_schema=False, dictionary_pagesize_limit=1 << 30)  # fmt: skip
    assert path.stat().st_size < 20_000
    command = "print(sum(1 for _ in readers.Source(path).items()), file=sys.stderr)"
    assert peak_of(command, path) < 2 << 30


def test_a_parquet_row_group_over_the_limit_is_an_error_before_it_is_read(tmp_path, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"{i} " * 300 for i in range(4000)]})
    parquet.write_table(table, path, row_group_size=3000)
    monkeypatch.setattr(readers, "MAX_ROW_GROUP", 1 << 20)
    with pytest.raises(UserError, match=r"row group 0 has .*the limit is .*row_group_size"):
        list(readers.Source(path).items())


@pytest.mark.parametrize("text", [
    '[{{"text": "a"}},{}{{"text": "b"}}]', '[{{"text": "a",{}"b": 2}}]', '[{}{{"text": "a"}}]',
    '[{{"text": "a"}}{}', '[{{"text": x}}{},{{"text": "b"}}]',
])  # fmt: skip
def test_white_space_in_an_array_takes_linear_time(text):
    def seconds(size):
        stream = io.BytesIO(text.format(" \n" * (size // 2)).encode())
        start = time.process_time()
        list(containers.read_array(stream))
        return time.process_time() - start

    small, large = (min(seconds(size << 20) for _ in range(2)) for size in (1, 8))
    assert large < 8 * 4 * small  # Quadratic: 64 times.
