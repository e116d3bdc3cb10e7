"""Protects the README's reader: files, commands and settings that it names are there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_file_of_the_tree_is_there():
    tree = README.split("## Reading the code")[1].split("```")[1]
    names = [
        name for line in tree.splitlines() for name in re.findall(r"^[\w/.]+|(?<=  )\w+\.py", line)
    ]
    assert len(names) > 14
    for name in names:
        assert (ROOT / name).exists(), name
    listed = set(re.findall(r"\w+\.py", tree))
    assert {path.name for path in ROOT.glob("*.py")} <= listed


def test_make_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target


PROGRAMS = (
    "train.py",
    "sft_train.py",
    "dpo_train.py",
    "chat.py",
    "-m tools.prepare_data",
    "-m tools.inspect_data",
    "-m tokenizer.train_tokenizer",
)


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What each program prints for --help."""
    return {
        program: subprocess.run(
            [sys.executable, *program.split(), "--help"],
            capture_output=True, text=True, cwd=ROOT, check=True,
        ).stdout
        for program in PROGRAMS
    }  # fmt: skip


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def test_every_program_named_is_one_whose_help_is_read():
    named = re.findall(r"`python (-m [\w.]+|\w+\.py)", README)
    assert len(named) >= 6
    assert set(named) <= set(PROGRAMS)


def test_options_are_those_of_the_programs(helps):
    for command, program in re.findall(r"`(python (-m [\w.]+|\w+\.py)[^`]*)`", README):
        assert options(command) <= options(helps[program]) | {"--help"}, command
    builder = subprocess.run(
        ["bash", "build.sh", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    # Those of git diff, docker build, docker builder prune.
    known = {"--no-index", "--no-cache", "--filter", "--help"} | options(builder.stdout)
    known = known.union(*map(options, helps.values()))
    assert options(README) <= known


def test_settings_are_those_of_the_stages(helps):
    files = ("py", "jsonl", "yaml", "json", "md")
    keys = set(re.findall(r"(?<![\w./-])((?:data|optim|model)\.\w+)", README))
    keys = {key for key in keys if not key.endswith(tuple(f".{end}" for end in files))}
    keys |= set(re.findall(r"`(out_dir|resume|init_from)=", README))
    assert len(keys) >= 6
    for key in keys:
        assert f"  {key}=" in helps["train.py"], key


def test_links_resolve():
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
