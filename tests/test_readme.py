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
    tree = README.split("```")[1]
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


@pytest.mark.parametrize(
    "program", ["train.py", "chat.py", "-m tools.prepare_data", "-m tokenizer.train_tokenizer"]
)
def test_programs_answer_help_with_the_options_named(program):
    command = [sys.executable, *program.split(), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    for line in README.splitlines():
        if program in line:
            for option in re.findall(r"(?<=[ `])--[\w-]+", line):
                if option not in ("--no-index", "--help"):
                    assert option in done.stdout, option
