"""Device settings, compilation with a fallback, and evaluation mode."""

import contextlib
import ctypes
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from trainlib.core.errors import UserError
from trainlib.core.hardware import Hardware

log = logging.getLogger(__name__)


def use_hardware(hardware: Hardware, local_rank: int = 0) -> Hardware:
    """Apply hardware settings to this process, and return them with the index of its card."""
    torch.set_float32_matmul_precision(hardware.matmul)
    if hardware.device.type == "cpu":
        keep_freed_memory()
    if hardware.device.type == "cuda":
        return replace(hardware, device=torch.device("cuda", local_rank))
    return hardware


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # Options for mallopt, from glibc's malloc.h.


def keep_freed_memory() -> None:
    """Keep freed memory in this process for reuse, if malloc is from glibc."""
    # Otherwise, glibc returns that of large tensors, and page faults take 3 to 4% of a step's time.
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def compile_layers(hardware: Hardware, layers: nn.ModuleList, run_once: Callable[[], object],
                   required: bool) -> Hardware:  # fmt: skip
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
            raise UserError(f"compile=on, but compilation failed ({reason}). Install a C++ "
                            "compiler (g++) and the Python headers, or set compile=auto to run "
                            "without compilation.") from error  # fmt: skip
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
