"""Streams and signals for a run that continues after its terminal is closed."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from typing import Any, TextIO


class DetachableStream(io.TextIOBase):
    """Text stream that falls back to /dev/null when its terminal is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, or discard it if the other end is gone (EIO, EPIPE)."""
        try:
            return self._stream.write(text)
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

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return the file descriptor of the stream."""
        return self._stream.fileno()


def survive_a_dead_terminal() -> None:
    """Ignore SIGHUP, and replace stdout and stderr with streams that survive their terminal."""
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # For example, under pythonw and in some services.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif not isinstance(stream, DetachableStream):
            setattr(sys, name, DetachableStream(stream))
