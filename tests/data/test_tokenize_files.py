"""Tests that a token cache is complete or absent, and that all broken rows are reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import DataConfig, expand, load_datasets
from tokenizer.chat_format import render_prompt
from trainlib.core.errors import UserError
from trainlib.core.files import cache_dir
from trainlib.data import token_cache, tokenize_files
from trainlib.data.encode import ENCODERS
from trainlib.data.epoch_plan import DataPosition
from trainlib.data.formats import ReadOptions
from trainlib.data.packing import PackedDataset
from trainlib.data.token_cache import TokenCache, build_cache

pytestmark = pytest.mark.usefixtures("elsewhere")

ROOT = Path(__file__).resolve().parents[2]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


def build(path, tokenizer, kind="pretrain", **kwargs):
    return build_cache(path, kind, tokenizer, **kwargs)


def content(cache):
    return {p.name: p.read_bytes() for p in cache.folder.iterdir() if p.suffix == ".bin"}


def many_chunks(monkeypatch, processes=False):
    """Use small chunks, so that a small file has many."""
    monkeypatch.setattr(tokenize_files, "CHUNK_BYTES", 200)
    monkeypatch.setattr(tokenize_files, "SMALL_FILE_BYTES", 0 if processes else 1 << 60)
    monkeypatch.setattr(tokenize_files, "num_usable_cores", lambda: 2)


def numbered(n):
    return [{"text": f"row {i} {'文字' * (i % 7)}", "source": f"s{i % 3}"} for i in range(n)]


def test_workers_and_chunk_size_do_not_change_the_cache(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "a.jsonl", [*numbered(60), "{\n", *numbered(60)])
    monkeypatch.setattr(token_cache, "MAX_SKIPPED", 0.02)
    contents = []
    for number, processes in enumerate((None, False, True)):
        monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / f"cache{number}"))
        if processes is not None:
            many_chunks(monkeypatch, processes)
        cache = build(path, tokenizer, on_error="skip")
        assert cache.num_records == 120 and cache.num_skipped == 1
        assert [cache.source(i) for i in range(4)] == ["s0", "s1", "s2", "s0"]
        contents.append(content(cache))
    assert contents[0] == contents[1] == contents[2]


# This program does not import torch, which would take longer than everything else.
CODE = """
import sys, time
from array import array
from pathlib import Path
from trainlib.data import encode, token_cache, tokenize_files
from tokenizer.bpe import Sequence, Tokenizer, default_folder
tokenize_files.CHUNK_BYTES = 200
tokenize_files.SMALL_FILE_BYTES = 0
tokenize_files.num_usable_cores = lambda: 2
token_cache.SAVE_SECONDS = 0
def slowly(tokenizer, record):
    time.sleep(0.01)
    ids = array(tokenizer.typecode, [0, *tokenizer.encode(record.value), 0])
    return [Sequence(ids, bytes([0] + [1] * (len(ids) - 1)))]
encode.ENCODERS["pretrain"] = slowly
print("ready", flush=True)
token_cache.build_cache(Path(sys.argv[1]), "pretrain", Tokenizer(default_folder()))
print("built", flush=True)
"""


def start(path):
    return subprocess.Popen([sys.executable, "-c", CODE, str(path)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_killed_build_is_resumed_and_its_workers_exit(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "a.jsonl", numbered(400))
    complete = build(path, tokenizer)
    expected = content(complete)
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "other"))
    process = start(path)
    deadline = time.monotonic() + 60
    saved: list[Path] = []
    while not saved and time.monotonic() < deadline:
        time.sleep(0.05)
        saved = list(cache_dir().glob("tokens/.making-*/progress.json"))
    workers = children(process.pid)
    process.kill()
    process.communicate()
    assert not list(cache_dir().glob("tokens/a-*")) and saved and workers
    num_saved = json.loads(saved[0].read_text())["items"]
    assert num_saved > 0
    with (saved[0].parent / "ids.bin").open("ab") as file:
        file.write(b"torn")  # Written after the last save.
    done = []
    real = tokenize_files.tokenize_chunk
    monkeypatch.setattr(tokenize_files, "CHUNK_BYTES", 200)
    monkeypatch.setattr(tokenize_files, "tokenize_chunk", lambda c, t: done.append(c) or real(c, t))
    resumed = build(path, tokenizer)
    assert content(resumed) == expected and resumed.key == complete.key
    assert done and done[0].items[0].line > num_saved
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.1)
    assert not [pid for pid in workers if Path(f"/proc/{pid}/stat").exists()
                and " Z " not in Path(f"/proc/{pid}/stat").read_text()]  # fmt: skip
    assert not [p for p in cache_dir().glob("tokens/.*")]


def test_two_processes_build_one_cache(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", numbered(150))
    both = [start(path), start(path)]
    for process in both:
        out, err = process.communicate(timeout=90)
        assert process.returncode == 0 and "built" in out, err
    [folder] = list(cache_dir().glob("tokens/*"))
    assert content(build(path, tokenizer)) and folder.name.startswith("a-")


def test_an_interrupted_build_leaves_no_cache(tmp_path):
    path = write(tmp_path / "a.jsonl", numbered(20_000))
    process = start(path)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    while not list(cache_dir().glob("tokens/.making-*")) and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None, "the build finished before it could be interrupted"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode and not list(cache_dir().glob("tokens/a-*"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_still_stops_the_build(tmp_path, tokenizer, monkeypatch):
    class Callback:
        """Python drops what is raised while an object is deleted."""

        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def encode(tokenizer, record):
        Callback()
        return real(tokenizer, record)

    real = ENCODERS["pretrain"]
    monkeypatch.setitem(ENCODERS, "pretrain", encode)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build(write(tmp_path / "a.jsonl", numbered(20)), tokenizer)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("deaths", [1, 99])
def test_a_killed_worker_costs_no_progress_and_its_line_is_named(
    deaths, tmp_path, tokenizer, monkeypatch, caplog
):
    path = write(tmp_path / "a.jsonl", numbered(120))
    expected = content(build(path, tokenizer))
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "other"))
    monkeypatch.setattr(token_cache, "SAVE_SECONDS", 0)
    many_chunks(monkeypatch, processes=True)
    real, kills, lines = ENCODERS["pretrain"], tmp_path / "kills", tmp_path / "lines"

    def encode(tokenizer, record):
        if record.line == 70 and (not kills.exists() or len(kills.read_text()) < deaths):
            with kills.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)  # As the kernel does if memory runs out.
        with lines.open("a") as file:
            file.write(f"{record.line}\n")
        return real(tokenizer, record)

    monkeypatch.setitem(ENCODERS, "pretrain", encode)
    if deaths > 1:
        with pytest.raises(UserError, match=r"a\.jsonl, line 70: .*killed twice.*same command"):
            build(path, tokenizer)
        assert list(cache_dir().glob("tokens/.making-*/progress.json"))
        lines.unlink()
        kills.write_text("x" * deaths)
    assert content(build(path, tokenizer)) == expected
    assert "are tokenized again, alone" in caplog.text
    assert deaths == 1 or min(map(int, lines.read_text().split())) > 60


MEASURE = """
import resource, sys
from pathlib import Path
from tokenizer.bpe import Tokenizer, default_folder
from trainlib.data.token_cache import build_cache
def peak():
    return [resource.getrusage(who).ru_maxrss
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
tokenizer = Tokenizer(default_folder())
start = peak()[0]
build_cache(Path(sys.argv[1]), sys.argv[2], tokenizer)
print(sum(max(0, value - start) for value in peak()) << 10)
"""


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_a_long_row_takes_little_memory(kind, tmp_path):
    """A row of 12 MB took 1.7 GB; the 200 MB that any row may take are not part of the ratio."""
    text = "word 文字 12, " * 800_000
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
    row = {"text": text} if kind == "pretrain" else {"messages": messages}
    path = write(tmp_path / "a.jsonl", [json.dumps(row, ensure_ascii=False) + "\n"])
    command = [sys.executable, "-c", MEASURE, str(path), kind]
    out = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout
    assert int(out) < (200 << 20) + 10 * path.stat().st_size


def test_skipped_rows_are_listed_and_are_an_error_with_on_error_stop(tmp_path, tokenizer, caplog):
    path = write(tmp_path / "a.jsonl", [*numbered(150), '{"text": 1}\n', *numbered(50)])
    cache = build(path, tokenizer, on_error="skip")
    listed = [json.loads(line) for line in (cache.folder / "skipped.jsonl").open()]
    assert [(row["line"], row["path"]) for row in listed] == [(151, str(path))]
    assert "1 of 201 rows are broken and were skipped" in caplog.text
    assert "skipped.jsonl" in caplog.text
    with pytest.raises(UserError, match="line 151: .*must be a string"):
        build(path, tokenizer)


def test_more_than_one_percent_of_broken_rows_is_an_error(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [*numbered(150), "{\n", "{\n"])
    with pytest.raises(UserError, match=r"2 of 152 rows .* 1% .*line 151: .*inspect_data"):
        build(path, tokenizer, on_error="skip")
    assert not [p for p in cache_dir().rglob("*") if p.is_file()]


def test_free_space_is_checked_before_a_build(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "a.jsonl", numbered(500))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(token_cache.shutil, "disk_usage", lambda _: usage(0, 0, 1000))
    with pytest.raises(UserError, match="MB free, .* needs about .*TRAIN_LLM_CACHE_DIR"):
        build(path, tokenizer)
    assert not [p for p in cache_dir().rglob("*") if p.is_file()]


def test_read_options_change_the_cache(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"instruction": "a", "input": "b", "output": "c"}] * 2)
    one = build(path, tokenizer, "sft")
    other = build(path, tokenizer, "sft", options=ReadOptions(alpaca_join=""))
    assert one.key != other.key and len(one.ids) > len(other.ids)


def test_ids_of_a_large_vocabulary_take_32_bits(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "a.jsonl", numbered(5))
    narrow = build(path, tokenizer)
    monkeypatch.setattr(type(tokenizer), "vocab_size", property(lambda self: 70000))
    monkeypatch.setattr(token_cache, "LAYOUT", 99)
    wide = build(path, tokenizer)
    assert narrow.ids.dtype == np.uint16 and wide.ids.dtype == np.uint32
    assert (narrow.ids == wide.ids).all()


# ---- folders, patterns, weights ------------------------------------------------------------------


def test_a_folder_and_a_pattern_are_one_dataset_each(tmp_path, tokenizer):
    for name in ("web/a.jsonl", "web/deep/b.jsonl", "books/x1.txt", "books/x2.txt"):
        rows = numbered(9) if name.endswith("jsonl") else [f"{name}\n\n" + "long line\n" * 3000]
        write(tmp_path / name, rows)
    (tmp_path / "web/README.txt").write_text("not data")
    config = DataConfig(files=("web", "books/*.txt"))
    data = load_datasets(config, "pretrain", tokenizer, 64, 0)
    assert set(data.val) == {"web", "books"} and len(data.train.caches) == 4


def test_names_that_match_no_files_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("a.txt", "b.txt", "a,b.txt"):
        write(tmp_path / name, ["text"])
    assert expand("a,b.txt") == [Path("a,b.txt")] and expand("a.txt,c") == [Path("a.txt,c")]
    for name, message in {
        "a.txt,b.txt": r"does not exist\. Pass a list: data\.files=\[a\.txt,b\.txt\]",
        "no*.txt": "no\\*.txt matches nothing", "empty": "contains no data files",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            expand(name)


def shares(data, epoch):
    """Return an epoch's positions per file, without padding, and how often each unit is used."""
    units = np.concatenate([row for row, _ in data.rows(DataPosition(epoch))])
    used = np.bincount(units, minlength=data.num_units)
    return np.bincount(data._file, used * data._length), used


def test_weights_are_shares_of_the_tokens_in_an_epoch(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", numbered(300))
    write(tmp_path / "b.jsonl", numbered(900))
    config = DataConfig(files=("a.jsonl:0.7", "b.jsonl:0.3"))
    data = load_datasets(config, "pretrain", tokenizer, 64, 0).train
    total = np.zeros(data.num_units)
    for epoch in range(4):
        tokens, used = shares(data, epoch)
        assert tokens[0] / tokens.sum() == pytest.approx(0.7, abs=0.01)
        assert used.min() >= 1 and (used[data._file == 1] == 1).all()
        assert tokens.sum() == pytest.approx(data.num_tokens, rel=0.01)
        total += used
    of_a = total[data._file == 0]
    assert of_a.max() - of_a.min() <= 1  # All rows of a file are used equally often.
    again = load_datasets(config, "pretrain", tokenizer, 64, 0).train
    rows = [row.tolist() for row, _ in data.rows(DataPosition(2, 5))]
    assert rows == [row.tolist() for row, _ in again.rows(DataPosition(2, 5))]
    assert rows == [row.tolist() for row, _ in again.rows(DataPosition(2))][5:]


@pytest.mark.parametrize(("files", "message"), [
    (("a.jsonl:0.7", "a.jsonl"), "has no weight"), (("a.jsonl:0",), "must be above 0"),
])  # fmt: skip
def test_invalid_weights_are_refused(files, message, tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", numbered(9))
    with pytest.raises(UserError, match=message):
        load_datasets(DataConfig(files=files), "pretrain", tokenizer, 64, 0)
    with pytest.raises(UserError, match="only data.files accepts weights"):
        config = DataConfig(files=("a.jsonl",), val_files=("a.jsonl:1",))
        load_datasets(config, "pretrain", tokenizer, 64, 0)


# ---- packing -------------------------------------------------------------------------------------


def test_a_long_conversation_is_truncated_after_the_last_answer_that_fits(tmp_path, tokenizer):
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"turn {i} " + "字" * i}
             for i in range(20)]  # fmt: skip
    short = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write(tmp_path / "a.jsonl", [{"conversations": turns}, {"conversations": short}])
    cache = build(path, tokenizer, "sft")
    bytes_ = np.array([len(b) for b in tokenizer.id_to_bytes])
    parts = [(cache, np.ones(2, bool))]
    for length in (40, 100, 101, 150, 250):
        data = PackedDataset(parts, "sft", length, bytes_, 0, too_long="cut")
        batch = data.collate([np.array([0])], 1)
        labels = batch.labels[0][batch.document_ids[0] == 0]
        ends = int((labels == tokenizer.im_end_id).sum())
        fitting = ENCODERS["sft"](tokenizer, _record(turns[: 2 * ends]))[0].ids
        too_long = ENCODERS["sft"](tokenizer, _record(turns[: 2 * ends + 2]))[0].ids
        assert ends and labels[-1] == tokenizer.im_end_id
        assert len(labels) == len(fitting) - 2 <= length < len(too_long) - 2
        assert sum(data.num_cut.values()) == 1 and not data.num_dropped and data.num_units == 2
    data = PackedDataset(parts, "sft", 100, bytes_, 0, too_long="drop")
    assert data.num_units == 1 and sum(data.num_dropped.values()) == 1 and not data.num_cut


def test_a_first_answer_that_does_not_fit_is_cut_inside(tmp_path, tokenizer):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "word 字 " * 50}]
    path = write(tmp_path / "a.jsonl", [{"conversations": turns}])
    cache = build(path, tokenizer, "sft")
    bytes_ = np.array([len(b) for b in tokenizer.id_to_bytes])
    prompt = render_prompt(tokenizer, turns[:1])
    whole = prompt + tokenizer.encode(turns[1]["content"]) + [tokenizer.im_end_id]
    for length in (len(prompt), 64, len(whole) - 2):
        data = PackedDataset([(cache, np.ones(1, bool))], "sft", length, bytes_, 0, too_long="cut")
        batch = data.collate([np.array([0])], 1)
        assert batch.input_ids[0].tolist() == whole[:length]
        expected = [-100] * (len(prompt) - 1) + whole[len(prompt) : length + 1]
        assert batch.labels[0].tolist() == expected
        assert tokenizer.im_end_id not in batch.labels and data.num_cut.total() == 1
    # One more position holds the end of turn, the next one the newline after it.
    for length, num_cut in ((len(whole) - 1, 1), (len(whole), 0)):
        data = PackedDataset([(cache, np.ones(1, bool))], "sft", length, bytes_, 0, too_long="cut")
        labels = data.collate([np.array([0])], 1).labels[0].tolist()
        assert labels[len(whole) - 2] == tokenizer.im_end_id and data.num_cut.total() == num_cut
    with pytest.raises(UserError, match=f"none of 1 rows fits in {len(prompt) - 1} positions"):
        PackedDataset([(cache, np.ones(1, bool))], "sft", len(prompt) - 1, bytes_, 0,
                      too_long="cut")  # fmt: skip


def _record(value):
    from trainlib.data.formats import Record

    return Record(value, "", Path("x"), 1)


def test_a_stored_plan_equals_a_new_plan(tmp_path, tokenizer, monkeypatch):
    from trainlib.data import packing

    path = write(tmp_path / "a.jsonl", numbered(300))
    cache = build(path, tokenizer)
    bytes_ = np.array([len(b) for b in tokenizer.id_to_bytes])

    def plan():
        data = PackedDataset([(cache, np.ones(300, bool))], "pretrain", 64, bytes_, 0)
        return [row.tolist() for row, _ in data.rows(DataPosition(1))]

    fresh = plan()
    monkeypatch.setattr(packing, "STORED_UNITS", 0)
    assert plan() == fresh == plan()
    assert len(list(cache_dir().glob("plans/*.npy"))) == 3
    monkeypatch.setattr(PackedDataset, "_pack", None)
    assert plan() == fresh  # Nothing is packed again.


letters = st.text(alphabet=st.sampled_from("a 中😀\n<|im_end|>é"), max_size=30)


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(answers=st.lists(letters, min_size=1, max_size=4), questions=st.lists(letters, min_size=4))
def test_the_mask_selects_exactly_the_answers_for_any_content(tokenizer, answers, questions):
    messages = []
    for question, answer in zip(questions, answers, strict=False):
        messages += [{"role": "user", "content": question},
                     {"role": "assistant", "content": answer}]  # fmt: skip
    [sequence] = ENCODERS["sft"](tokenizer, _record(messages))
    supervised = [i for i, m in zip(sequence.ids, sequence.mask, strict=True) if m]
    expected = [i for a in answers for i in [*tokenizer.encode(a), tokenizer.im_end_id]]
    assert supervised == expected
    assert tokenizer.decode(supervised) == "".join(answers)


def test_a_system_error_becomes_a_user_error(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", numbered(5))
    cache_dir().parent.mkdir(exist_ok=True)
    cache_dir().write_text("a file where the folder should be")
    with pytest.raises(UserError, match="Set TRAIN_LLM_CACHE_DIR to another folder"):
        build(path, tokenizer)
    assert os.path.isfile(path)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    turns=st.lists(st.tuples(letters, letters.filter(bool)), min_size=1, max_size=4),
    row_length=st.integers(1, 80),
)
def test_every_cut_row_fits_and_learns_no_end_that_is_not_there(tokenizer, turns, row_length):
    """Fails if a cut row is not the beginning of the row, or if it is shorter than it could be."""
    [full] = ENCODERS["sft"](tokenizer, _record([
        {"role": role, "content": text}
        for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)
    ]))  # fmt: skip
    ids, mask = np.array(full.ids, np.int64), np.frombuffer(full.mask, bool)
    cache = TokenCache(Path("x"), "", ids, mask.astype(np.uint8), np.array([0, len(ids)]),
                       np.array([1]), np.zeros(1, np.uint64), np.zeros(1, np.uint16),
                       [""])  # fmt: skip
    bytes_ = np.array([len(b) for b in tokenizer.id_to_bytes])
    targets = np.flatnonzero(mask & (np.arange(len(mask)) <= row_length))
    if not len(targets):
        with pytest.raises(UserError, match="none of 1 rows fits"):
            PackedDataset([(cache, np.ones(1, bool))], "sft", row_length, bytes_, 0, too_long="cut")
        return
    data = PackedDataset([(cache, np.ones(1, bool))], "sft", row_length, bytes_, 0, too_long="cut")
    batch = data.collate([np.array([0])], 1)
    n = batch.num_tokens
    assert n <= row_length and batch.input_ids[0, :n].tolist() == ids[:n].tolist()
    labels = np.where(mask, ids, -100)[1 : n + 1]
    assert batch.labels[0, :n].tolist() == labels.tolist()
    ends = [i for i in targets if ids[i] == tokenizer.im_end_id]
    assert n == (len(ids) - 1 if len(ids) - 1 <= row_length else (ends or targets)[-1])
    assert (labels == tokenizer.im_end_id).sum() == len(ends)
