"""Where a run computes: device, precision, compilation; and looking without disturbing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainlib.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hardware:
    """How this machine computes: nothing here changes what is learned, but for rounding."""

    device: torch.device
    precision: str
    compile: bool
    micro_batch_size: int

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass: bf16 products over fp32 weights, or nothing."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()


def choose_hardware(
    device: str, precision: str, compile_: str, micro_batch_size: int, row_length: int
) -> Hardware:
    """Turn "auto" into what fits this machine; raises UserError for what it does not have."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device=cuda, but torch sees no CUDA device here. Use device=cpu, or check "
            '`nvidia-smi` and `python -c "import torch; print(torch.version.cuda)"`.'
        )
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps, but torch has no Metal device here. Use device=cpu.")
    bf16 = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    if precision == "auto":
        precision = "bf16" if bf16 else "fp32"
    if precision == "bf16" and device == "cuda" and not bf16:
        raise UserError(
            "precision=bf16 needs a card of compute capability 8.0 or more (this one has "
            f"{'.'.join(map(str, torch.cuda.get_device_capability()))}). Use precision=fp32."
        )
    if not micro_batch_size:
        # 2,048 positions keep a CPU's caches warm (2,785 tokens/s at 4 x 512 against 2,213 at
        # 8 x 512 on two cores); a card is fed 32,768.
        micro_batch_size = max(1, (2048 if device == "cpu" else 32768) // row_length)
    compiled = compile_ == "on" or (compile_ == "auto" and device == "cuda")
    return Hardware(torch.device(device), precision, compiled, micro_batch_size)


def set_matmul_precision(hardware: Hardware) -> None:
    """Tell torch how fp32 matrix products may round.

    On a CPU "medium" means oneDNN, exact fp32 and up to 1.6 times faster than "highest"; only
    with AMX would it round to bf16. On CUDA "high" means TF32.
    """
    if hardware.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        amx = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
        torch.set_float32_matmul_precision("highest" if amx else "medium")


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
