"""Tests that a character that stdout cannot encode is replaced, and no later line is lost."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

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


STALL = """import sys, time
from trainlib.core.terminal import WaitingStream, survive_a_dead_terminal
survive_a_dead_terminal()
WaitingStream.everything = "; all of them are in runs/x/train.log"
begin = time.monotonic()
number = 0
while time.monotonic() < begin + float(sys.argv[1]):
    for stream in (sys.stdout, sys.stderr):
        print("line", number, "x" * 80, file=stream)
        number += 1
    time.sleep(0.01)
print("x" * 20_000)  # More than one write.
sys.exit("error: the end of %d lines" % number)
"""


def open_pipe():
    return os.pipe()


def open_terminal():
    reader, writer = pty.openpty()
    termios.tcflow(writer, termios.TCOOFF)  # As Ctrl-S.
    return reader, writer


def read_all(reader) -> str:
    parts = []
    with contextlib.suppress(OSError):  # EIO: the other end of the terminal is closed.
        while part := os.read(reader, 1 << 16):
            parts.append(part)
    return b"".join(parts).decode().replace("\r\n", "\n")


def start(reader, writer, seconds):
    command = [sys.executable, "-c", STALL, str(seconds)]
    return subprocess.Popen(command, stdout=writer, stderr=writer, cwd=ROOT)


@pytest.mark.parametrize("opened", [open_pipe, open_terminal])
def test_a_reader_that_takes_nothing_for_a_while_stops_nothing(opened):
    reader, writer = opened()
    if opened is open_pipe:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    process = start(reader, writer, 9)
    time.sleep(7.5)
    if opened is open_terminal:
        termios.tcflow(writer, termios.TCOON)
    os.close(writer)
    lines = read_all(reader).splitlines()
    assert process.wait(timeout=30) == 1
    (notice,) = (line for line in lines if "lines were not shown" in line)
    assert notice.endswith("; all of them are in runs/x/train.log")
    shown = [int(line.split()[1]) for line in lines if line.startswith("line ")]
    assert shown == sorted(shown)
    dropped = int(notice.split()[0].replace(",", ""))
    assert dropped > 50 and lines[-1] == f"error: the end of {len(shown) + dropped} lines"
    assert "x" * 20_000 in lines
    # Before and after a single gap, every line is there.
    assert sum(b - a != 1 for a, b in zip(shown, shown[1:], strict=False)) == 1


def test_a_program_ends_although_nobody_reads():
    reader, writer = open_pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    begin = time.monotonic()
    process = start(reader, writer, 1)
    os.close(writer)
    assert process.wait(timeout=30) == 1
    assert 5 < time.monotonic() - begin < 12
    os.close(reader)


def test_a_slow_reader_gets_every_line():
    reader, writer = open_pipe()
    process = start(reader, writer, 1)
    os.close(writer)
    time.sleep(3)
    lines = read_all(reader).splitlines()
    assert process.wait(timeout=30) == 1
    count = sum(line.startswith("line ") for line in lines)
    assert lines[-1] == f"error: the end of {count} lines" and count > 10


PROGRAM = "import trainlib.core.threads, os, sys, time\n"


@pytest.mark.parametrize(
    ("code", "exit_code", "error"),
    [
        ("import signal; signal.raise_signal(signal.SIGINT)", 130, "interrupted\n"),
        ("time.sleep(0.5)\nfor _ in range(99999): print('x')", 141, ""),
        ("time.sleep(0.5); print('x')", 0, ""),  # Flushed at exit.
        ("sys.path[:] = ['.']; import numpy", 1, "has no package numpy. Run `make env`"),
        ("import no_such_module_of_ours", 1, "Traceback"),
    ],
)
def test_programs_end_without_a_traceback(code, exit_code, error):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM + code], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)  # fmt: skip
    assert process.stdout and process.stderr
    process.stdout.close()
    text = process.stderr.read()
    assert process.wait(timeout=30) == exit_code, text
    assert error in text and bool(error) == bool(text)
    assert error == "Traceback" or text.count("\n") <= 1
