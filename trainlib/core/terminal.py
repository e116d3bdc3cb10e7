"""A training outlives its terminal: a closed window must not end hours of work."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Any, TextIO


class Lasting(io.TextIOBase):
    """A text stream that goes on as /dev/null once nobody can be written to any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or drop the text where the other end is gone (EIO, EPIPE)."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            self._let_go()
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what is left."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._let_go()

    def _let_go(self) -> None:
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            # The descriptor too, so that what the stream still buffers goes somewhere at exit.
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """Whether a person may be watching."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The stream's own descriptor."""
        return self._stream.fileno()


def survive_a_dead_terminal() -> None:
    """Ignore SIGHUP, and let stdout and stderr end without ending the program."""
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # Started without one, as pythonw and some services do.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif not isinstance(stream, Lasting):
            setattr(sys, name, Lasting(stream))
