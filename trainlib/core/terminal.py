"""Standard streams: characters that they cannot encode, and terminals that are closed."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
from typing import Any, TextIO


class DetachableStream:
    """Text stream that falls back to /dev/null when its terminal is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, or discard it if the file is closed or its other end is gone (EIO, EPIPE)."""
        try:
            return self._stream.write(text)
        except UnicodeError:  # A ValueError, but the terminal is still there.
            raise
        except (OSError, ValueError):
            self._detach()
            return len(text)

    def flush(self) -> None:
        """Flush the buffer, or discard it if the other end is gone."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._detach()

    def _detach(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            # Redirect the descriptor too, so that the stream can flush its buffer at exit.
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


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
    """Ignore SIGHUP, and replace stdout and stderr with streams that survive their terminal."""
    use_replacement_characters()
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # For example, under pythonw and in some services.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif not isinstance(stream, DetachableStream):
            setattr(sys, name, DetachableStream(stream))
