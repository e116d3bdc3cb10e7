"""A run's hardware in use: autocast, compilation with its fallback, looking without disturbing."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainlib.batches import Place, StepLoader
from trainlib.errors import UserError
from trainlib.hardware import Choice

if TYPE_CHECKING:
    from trainlib.launch import Run

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Hardware:
    """How this process computes."""

    device: torch.device
    precision: str
    attention: str
    compile: bool
    micro_batch_size: int

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass: 16-bit products over fp32 weights, or nothing."""
        if self.precision in DTYPES:
            return torch.autocast(self.device.type, dtype=DTYPES[self.precision])
        return contextlib.nullcontext()


LONG_RUN = 2e14
"""Floating-point operations from which a run on a CPU is compiled: a quarter of an hour of two
cores. It takes half a minute, and in bf16 steps are 1.1 times as fast; in fp32 nothing was won."""


def use_hardware(choice: Choice, local_rank: int = 0) -> Hardware:
    """Make a choice of hardware this process's own."""
    torch.set_float32_matmul_precision(choice.matmul)
    if choice.device == "cpu":
        keep_freed_memory()
    device = (
        torch.device("cuda", local_rank) if choice.device == "cuda" else torch.device(choice.device)
    )
    c = choice
    return Hardware(device, c.precision, c.attention, c.compile, c.micro_batch_size)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""As glibc's malloc.h numbers them."""


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for its next step; where malloc is not glibc's, nothing.

    Else tensors of megabytes go back to the system, and every step fetches their pages anew, 3 to
    4 % of its time. What only the start of a run needs is kept as well.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def compile_layers(
    hardware: Hardware, layers: nn.ModuleList, try_out: Callable[[], object], required: bool
) -> Hardware:
    """Compile a model's layers in place, and try the result out; nothing wraps the model.

    Where compilation fails (no C compiler, a card that Triton does not know), says why, and the
    layers run as they are; returns the hardware as it is then used. Raises UserError where
    compilation is required.
    """
    log.info("compiling the layers, once; a minute on a CPU the first time, seconds from a cache")
    begin = time.perf_counter()
    # Boundaries of documents come in a few lengths, with and without gradients: each is a variant.
    torch._dynamo.config.recompile_limit = 64
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=False)
    try:
        try_out()
    except Exception as error:  # noqa: BLE001  # Inductor, Triton and gcc fail in many ways.
        for layer in layers:
            layer._compiled_call_impl = None
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        if required:
            raise UserError(
                f"compile=on, but compiling failed ({reason}). It needs a C++ compiler (g++) and "
                "Python's headers; use compile=auto to go on without."
            ) from error
        log.warning("compiling failed, so the layers run uncompiled (%s)", reason)
        return replace(hardware, compile=False)
    log.info("compiled in %.0f s", time.perf_counter() - begin)
    return hardware


def try_attention(
    hardware: Hardware, model: nn.Module, gradient: Callable[[], torch.Tensor]
) -> Hardware:
    """Use the chosen attention kernel if it works here and agrees with the masked one to 5 %.

    `gradient` gives that of a micro-batch as one vector; what 16-bit numbers lose is about 1 %.
    Returns the hardware as it is then used.
    """
    expected = gradient()
    try:
        model.attention = hardware.attention  # type: ignore[assignment]
        off = float((gradient() - expected).norm() / expected.norm())
        reason = "" if off <= 0.05 else f"its gradient is off by {off:.1%}"
    except Exception as error:  # noqa: BLE001  # A kernel can refuse a card in many ways.
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    if reason:
        model.attention = "masked"  # type: ignore[assignment]
        log.warning("attention: the %s kernel is left out (%s)", hardware.attention, reason)
        return replace(hardware, attention="masked")
    return hardware


def warm_up(run: Run, model: nn.Module, loader: StepLoader, num_steps: int | None = None) -> None:
    """Try out the attention kernel, and compile the layers; weights and random state stay.

    What fails is left out, and the log says so. To be called before the model is first used, so
    that all that it computes in a run is computed in one way. `num_steps` is the run's length,
    where it is known.
    """
    where = (run.hardware.device.type, run.hardware.precision)
    if run.config.compile == "auto" and num_steps and where == ("cpu", "bf16"):
        positions = num_steps * loader.rows_per_step * loader.dataset.row_length
        if positions * run.flops_per_token >= LONG_RUN:
            run.hardware = replace(run.hardware, compile=True)
    kernel = run.hardware.attention
    if kernel == "blocks":
        model.attention = kernel  # type: ignore[assignment]
    # varlen alone is tried out: it is torch's, and differs by card.
    if not run.hardware.compile and kernel != "varlen":
        return
    batch = next(loader).micro_batches[0].to(run.hardware.device)
    loader.seek(Place())

    def gradient() -> torch.Tensor:
        """Of the attention layers' weights, by way of all others."""
        with run.hardware.autocast():
            logits = model(**batch.inputs)
        # Summed over a row: a mean over all would vanish in fp16.
        (logits.float().square().sum() / len(batch.input_ids)).backward()
        parts = [
            p.grad.flatten()
            for name, p in model.named_parameters()
            if "attn" in name and p.grad is not None
        ]
        model.zero_grad(set_to_none=True)
        return torch.cat(parts)

    def try_out() -> None:
        gradient()
        with looking(model), run.hardware.autocast():  # A program of its own.
            model(**batch.inputs)

    with awake(model):
        if kernel == "varlen":
            run.hardware = try_attention(run.hardware, model, gradient)
        if run.hardware.compile and run.layers is not None:
            required = run.config.compile == "on"
            run.hardware = compile_layers(run.hardware, run.layers, try_out, required)


@contextlib.contextmanager
def awake(model: nn.Module) -> Iterator[None]:
    """For a while without zero matrices: in a fresh model they hide what attention does."""
    zeros = [p for p in model.parameters() if p.ndim == 2 and not p.any()]
    with torch.no_grad():
        for p in zeros:
            p.normal_(std=0.02, generator=torch.Generator(p.device).manual_seed(0))
    try:
        yield
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()


@contextlib.contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards mode and random state are as before."""
    was_training, cpu_state = model.training, torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        torch.set_rng_state(cpu_state)
        if cuda_state:
            torch.cuda.set_rng_state_all(cuda_state)


LossFunction = Callable[[nn.Module, Any], tuple[torch.Tensor, dict[str, tuple[Any, Any]]]]
