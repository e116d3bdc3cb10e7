"""Standard streams: characters that they cannot encode, readers that are gone or take nothing."""

import atexit
import contextlib
import io
import os
import re
import signal
import sys
import threading
import time
from types import TracebackType
from typing import Any

PATIENCE = 5.0
"""Seconds without a byte taken after which lines are dropped, and after which a program ends."""
LIMIT, PIECE = 1 << 20, 4096  # Maximum number of waiting bytes, and of bytes in one write.


class WaitingStream(io.RawIOBase):
    """Binary stream written by a thread, so that a reader who takes nothing stops nothing else."""

    everything = ""
    """Says where the lines are that were not shown, once this is known."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream  # Kept, because it closes its file when it is freed.
        self._raw: Any = getattr(stream.buffer, "raw", stream.buffer)
        self.fileno, self.isatty = self._raw.fileno, self._raw.isatty
        self._pid, self._changed = os.getpid(), threading.Condition()
        self._waiting, self._taken = bytearray(), 0.0
        self._dropped: int | None = None
        threading.Thread(target=self._run, name="terminal", daemon=True).start()

    def writable(self) -> bool:
        """Return True."""
        return True

    def _stalled(self, begin: float = 0.0) -> bool:
        return time.monotonic() - max(begin, self._taken) > PATIENCE

    def write(self, data: Any) -> int:
        """Leave bytes to the thread; drop them if nothing has been taken for PATIENCE seconds."""
        data = bytes(data)
        if os.getpid() != self._pid:  # A forked process does not have the thread.
            self._send(data)
            return len(data)
        with self._changed:
            if not self._waiting:
                self._taken = time.monotonic()
            while len(self._waiting) > LIMIT and self._dropped is None and not self._stalled():
                self._changed.wait(0.1)
            # One gap: nothing is added until everything before it has been taken.
            if self._dropped is not None or self._stalled():
                self._dropped = (self._dropped or 0) + data.count(b"\n")
            else:
                self._waiting += data
                self._changed.notify_all()
        return len(data)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                piece = bytes(self._waiting[:PIECE])
            num_taken = self._send(piece)
            if not num_taken:  # Another program made the terminal non-blocking.
                time.sleep(0.05)
                continue
            with self._changed:
                self._taken = time.monotonic()
                del self._waiting[:num_taken]
                if not self._waiting and self._dropped is not None:
                    text = f"{self._dropped:,} lines were not shown{self.everything}\n".encode()
                    if self._dropped:
                        self._waiting += text if piece.endswith(b"\n") else b"\n" + text
                    self._dropped = None
                self._changed.notify_all()

    def _send(self, data: bytes) -> int | None:
        """Write bytes; discard them if the file is closed or its other end is gone (EIO, EPIPE)."""
        try:
            return self._raw.write(data)
        except (OSError, ValueError):
            discard_output(self._raw)
            return len(data)

    def drain(self) -> None:
        """Wait until everything is written, or nothing is taken for PATIENCE seconds."""
        begin = time.monotonic()
        with self._changed:
            while self._waiting and not self._stalled(begin):
                self._changed.wait(0.1)
            if self._waiting:
                discard_output(self._raw)
            self._waiting.clear()
            self._pid = 0  # From now on without the thread, which ends before Python does.


def discard_output(stream: Any) -> None:
    """Redirect a stream's descriptor to /dev/null, so that its buffer can be flushed at exit."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def use_replacement_characters() -> None:
    """Make stdout replace characters that its encoding lacks, and stdin replace invalid bytes."""
    # Python makes stderr do so. A stream can be None, or anything that a caller put there.
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def valid_text(argument: str) -> str:
    """Return a command-line argument with U+FFFD for each byte that could not be decoded."""
    return re.sub("[\ud800-\udfff]", "\ufffd", argument)


def survive_a_dead_terminal() -> None:
    """Ignore SIGHUP, and let threads write stdout and stderr."""
    use_replacement_characters()
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    waiting: dict[tuple[int, int], Any] = {}  # Two streams to one terminal keep their order.
    for name in ("stdout", "stderr"):
        stream = vars(sys)[name]
        if stream is None:  # For example, under pythonw and in some services.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
            continue
        # A stream without a descriptor, as in a notebook, is left as it is.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if not isinstance(stream.buffer, WaitingStream):
                stream.flush()
                status = os.fstat(stream.fileno())
                key = status.st_dev, status.st_ino
                if key not in waiting:
                    waiting[key] = WaitingStream(stream)
                text = io.TextIOWrapper(waiting[key], stream.encoding, stream.errors, None, True)
                setattr(sys, name, text)


@atexit.register
def finish_output() -> None:
    """Write what is waiting if the readers take it; do not fail if stdout has no reader."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
                if isinstance(waiting := getattr(stream, "buffer", None), WaitingStream):
                    waiting.drain()
        except BrokenPipeError:
            discard_output(stream)
        except ValueError:  # Closed.
            pass


PACKAGES = {"torch", "numpy", "tokenizers", "safetensors", "tensorboard", "tqdm", "yaml"}


def end_in_one_line(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Replace sys.excepthook: no traceback for Ctrl-C, a closed pipe, and a missing package."""
    if isinstance(error, BrokenPipeError):
        discard_output(sys.stdout)
        sys.exit(128 + 13)  # As a program that SIGPIPE ends.
    if isinstance(error, KeyboardInterrupt) and not hasattr(sys, "ps1"):
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    if isinstance(error, ModuleNotFoundError) and error.name in PACKAGES:
        fix = "Run `make env` once, then `. .venv/bin/activate`."
        sys.exit(f"error: {sys.executable} has no package {error.name}. {fix}")
    sys.__excepthook__(kind, error, trace)
