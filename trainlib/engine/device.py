"""Autocast, compilation with a fallback, and evaluation mode."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from trainlib.core.errors import UserError
from trainlib.core.hardware import DTYPES, Choice

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hardware:
    """Hardware settings for this process; the warm-up sets `kernels`."""

    device: torch.device
    precision: str
    attention: str
    """Attention kernel for the device: masked, varlen or blocks."""
    compile: bool
    micro_batch_size: int
    kernels: tuple[str, ...] = ()
    """Kernels in use instead of the plain formulas (trainlib/engine/kernels.py)."""

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the forward-pass context: 16-bit matmuls with fp32 weights, or a null context."""
        if self.precision in DTYPES:
            return torch.autocast(self.device.type, dtype=DTYPES[self.precision])
        return contextlib.nullcontext()


def use_hardware(choice: Choice, local_rank: int = 0) -> Hardware:
    """Apply the chosen hardware settings to this process, and return them."""
    torch.set_float32_matmul_precision(choice.matmul)
    if choice.device == "cpu":
        keep_freed_memory()
    c = choice
    device = torch.device(f"cuda:{local_rank}" if c.device == "cuda" else c.device)
    return Hardware(device, c.precision, c.attention, c.compile, c.micro_batch_size)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Options for mallopt, from glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Keep freed memory in this process for reuse, if malloc is from glibc.

    Otherwise, glibc returns the memory of large tensors to the system, and every step spends 3 to
    4% of its time on page faults. Memory that is needed only at startup is kept as well.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def compile_layers(
    hardware: Hardware, layers: nn.ModuleList, run_once: Callable[[], object], required: bool
) -> Hardware:
    """Compile the layers of a model in place, run them once, and return the hardware in use.

    If compilation fails (no C++ compiler, a card that Triton does not support), the layers stay
    uncompiled and the reason is logged. Raises UserError instead if compilation is required.
    """
    log.info("compiling the layers (up to a minute on a CPU, a few seconds if cached)")
    begin = time.perf_counter()
    # Each length of `boundaries` is compiled separately, with and without gradients.
    torch._dynamo.config.recompile_limit = 64
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=False)
    try:
        run_once()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  # Inductor, Triton and gcc can fail in many ways.
        for layer in layers:
            layer._compiled_call_impl = None
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        if required:
            raise UserError(
                f"compile=on, but compilation failed ({reason}). Install a C++ compiler (g++) and "
                "the Python headers, or set compile=auto to run without compilation."
            ) from error
        log.warning("compilation failed, so the layers run uncompiled (%s)", reason)
        return replace(hardware, compile=False)
    log.info("compiled in %.0f s", time.perf_counter() - begin)
    return hardware


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set eval mode and disable gradients; restore the mode and the RNG state on exit."""
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())), torch.no_grad():
            yield
    finally:
        model.train(was_training)
