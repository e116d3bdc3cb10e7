"""Settings that precede the import of torch: this is the first import of every program.

A waiting thread of libgomp spins for as long as it likes, on busy cores in the time of the thread
that it waits for: next to four busy processes, 3,000 spins make a step two to five times as fast.
"""

import os
import signal
import sys
from types import FrameType

from trainlib.core.terminal import end_in_one_line

sys.excepthook = end_in_one_line


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; end at once while torch is imported, whose C++ code would abort."""
    if getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False):
        os.write(2, b"interrupted\n")
        os._exit(130)
    signal.default_int_handler(number, frame)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupt)

if "OMP_WAIT_POLICY" not in os.environ:  # The user's choice.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# A request to save (engine/control.py) may arrive before or after training, and must not kill.
if hasattr(signal, "SIGUSR1"):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
