"""Tests that a character that stdout cannot encode is replaced, and no later line is lost."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainlib.core.terminal import DetachableStream

ROOT = Path(__file__).resolve().parents[2]
CODE = """from trainlib.core.terminal import *
{}()
print("你好 \\u00e9 \\ud800")
print(len(input()), flush=True)
print("last")
"""


@pytest.mark.parametrize("function", ["use_replacement_characters", "survive_a_dead_terminal"])
@pytest.mark.parametrize(
    ("encoding", "first"),
    [
        ("ascii", b"?? ? ?"),
        ("ascii:surrogateescape", b"?? ? ?"),  # As in the locale POSIX.
        ("cp1252", b"?? \xe9 ?"),
        ("gbk", "你好 é ?".encode("gbk")),
        ("utf-8", "你好 é ?".encode()),
    ],
)
def test_characters_and_bytes_outside_the_encoding_are_replaced(function, encoding, first):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(function)], input=b"a\xff\xffb\n", cwd=ROOT,
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert [lines[0], lines[-1]] == [first, b"last"] and not done.stderr


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("[bt][eo]*/*.py")], ids=str)
def test_every_program_replaces_characters(path):
    """`launch` does so for the stages."""
    text = path.read_text(encoding="utf-8")
    if '__name__ == "__main__"' in text and "def main(" in text:
        main = text[text.index("def main(") :] + text[text.index('if __name__ == "__main__"') :]
        assert "    use_replacement_characters()\n" in main or "    launch(" in main


def test_an_encoding_error_is_not_a_dead_terminal():
    raw = io.BytesIO()
    stream = DetachableStream(io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    with pytest.raises(UnicodeEncodeError):
        stream.write("你")
    stream.write("still here")
    assert raw.getvalue() == b"still here"
    stream._stream.close()
    assert stream.write("nobody reads this") == 17
