"""Choose the functions that compute the decoder: kernels, where they agree with model.py.

Before the model is used, each candidate is compared with the plain formula on small inputs.
Therefore, a run uses your version of an edited formula. The log says why a kernel is not used.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import model
from kernels import block_attention, fused_cpu, varlen_attention
from model import AttentionOp, ModelConfig, Ops, rotary_angles
from trainlib.core.distributed import DistributedContext
from trainlib.core.hardware import DTYPES, Hardware

log = logging.getLogger(__name__)

ROWS = 2
POSITIONS = 256  # Maximum number of positions in the inputs of position-wise functions.
FACTOR, FLOOR = 2.0, 1e-4
"""Error limit: FACTOR times the error of the plain formula in the run's precision, plus FLOOR."""
ATTENTION = {"blocks": AttentionOp(block_attention.prepare, block_attention.attend),
             "varlen": AttentionOp(varlen_attention.prepare, varlen_attention.attend)}  # fmt: skip
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Candidate:
    """A kernel, and how to call it or the plain formula on test inputs."""

    name: str
    op: str  # The field of model.Ops that it replaces.
    function: Any
    inputs: Values  # Test inputs, in the dtypes of a run.
    call: Callable[[Any, Values], Tensor]


def choose_kernels(hardware: Hardware, config: ModelConfig, row_length: int,
                   distributed: DistributedContext, plain: bool = False) -> Hardware:  # fmt: skip
    """Set model.ops for a run; return the hardware with the names of the kernels in use.

    Call it before the layers are compiled. A candidate is used if, on every rank, the relative L2
    errors of its output and gradients against the formula in fp32 are at most FACTOR times those of
    the formula in the run's precision, plus FLOOR. With `plain`, no candidate is tested.
    """
    chosen, reasons = Ops(), {}
    candidates = [] if plain else find_candidates(hardware, config, row_length)
    for candidate in candidates:
        if reason := disagreement(candidate, hardware):
            reasons[candidate.name] = reason
    for gathered in distributed.all_gather_object(reasons):
        reasons = {**gathered, **reasons}
    accepted = [candidate for candidate in candidates if candidate.name not in reasons]
    for candidate in accepted:
        setattr(chosen, candidate.op, candidate.function)
    vars(model.ops).update(vars(chosen))
    names = tuple(candidate.name for candidate in accepted)
    unused = ", ".join(f"{name} ({reason})" for name, reason in reasons.items())
    log.info("kernels: %s%s", ", ".join(names) or "plain", unused and f"; not used: {unused}")
    return replace(hardware, kernels=names)


def find_candidates(hardware: Hardware, config: ModelConfig, row_length: int) -> list[Candidate]:
    """Return the candidates for a device, each with test inputs of the model's dimensions.

    Inputs have mean 1, so that errors do not cancel. In swiglu's second row, they reveal a clamp.
    """
    generator = torch.Generator().manual_seed(0)
    device, dtype = hardware.device, DTYPES.get(hardware.precision, torch.float32)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.randn(shape, generator=generator) + 1
        return values.to(device, dtype)

    candidates = []
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if hardware.attention in ATTENTION:
        position_ids, document_ids = (x.to(device) for x in _documents(row_length))

        def attention(function: AttentionOp, x: Values) -> Tensor:
            prepared = function.prepare(position_ids, document_ids, None, x["v"].dtype)
            return function.attend(x["q"], x["k"], x["v"], prepared)

        # Under autocast, QK-norm and rotation return fp32.
        qkv = {"q": normal(ROWS, heads, row_length, size),
               "k": normal(ROWS, groups, row_length, size),
               "v": normal(ROWS, groups, row_length, size, dtype=dtype)}  # fmt: skip
        name = hardware.attention
        candidates.append(Candidate(name, "attention", ATTENTION[name], qkv, attention))
    if device.type == "cpu" and not hardware.compile:
        length, width = min(row_length, POSITIONS), config.intermediate_size
        positions = torch.arange(row_length)[-length:].expand(ROWS, -1)
        angles = rotary_angles(positions, size, config.rope_theta)
        rows = torch.tensor([1, 4], dtype=dtype).view(ROWS, 1, 1)
        hidden = {"x": normal(ROWS, length, config.hidden_size, dtype=dtype),
                  "weight": normal(config.hidden_size)}  # fmt: skip
        gated = {"gate": rows * normal(ROWS, length, width, dtype=dtype),
                 "up": normal(ROWS, length, width, dtype=dtype),
                 "down_weight": normal(config.hidden_size, width)}  # fmt: skip
        candidates += [
            Candidate("rms_norm", "rms_norm", fused_cpu.rms_norm, hidden,
                      lambda f, x: f(x["x"], x["weight"], config.rms_norm_eps)),
            Candidate("rotate", "rotate", fused_cpu.rotate,
                      {"x": normal(ROWS, heads, length, size)}, lambda f, x: f(x["x"], *angles)),
            Candidate("swiglu", "swiglu", fused_cpu.swiglu, gated,
                      lambda f, x: f(x["gate"], x["up"], x["down_weight"])),
        ]  # fmt: skip
    return candidates


def _documents(row_length: int) -> tuple[Tensor, Tensor]:
    """Return position and document ids for two rows: one long document, and many short ones."""
    short = torch.arange(row_length).float().mul(2).sqrt().long() + 1  # Lengths 1, 2, 3, ...
    document_ids = torch.stack([torch.zeros(row_length, dtype=torch.int64), short])
    starts = torch.cat([torch.ones(ROWS, 1), document_ids.diff(dim=1)], 1) != 0
    index = torch.arange(row_length).expand(ROWS, -1)
    position_ids = index - (index * starts).cummax(1).values
    return position_ids, document_ids


def disagreement(candidate: Candidate, hardware: Hardware) -> str:
    """Return how a candidate fails or differs from the plain formula, or "" if it agrees."""
    plain = getattr(Ops(), candidate.op)
    exact_run = replace(hardware, precision="fp32")
    wide = replace(candidate, inputs={name: x.float() for name, x in candidate.inputs.items()})
    exact, expected = _results(wide, plain, exact_run), _results(candidate, plain, hardware)
    try:
        found = _results(candidate, candidate.function, hardware)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  # A kernel can refuse a device in many ways.
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    for name, value in found.items():
        dtypes = [None if x is None else x.dtype for x in (value, expected[name])]
        if dtypes[0] != dtypes[1]:
            return f"{name} is {dtypes[0]}, not {dtypes[1]}; was model.py edited?"
        if value is None:
            continue
        error, allowed = (_error(x, exact[name]) for x in (value, expected[name]))
        if not error <= FACTOR * allowed + FLOOR:
            return f"{name} differs by {error:.2g}; was model.py edited?"
    return ""


def _results(candidate: Candidate, function: Any, hardware: Hardware) -> dict[str, Any]:
    """Return a function's output, and its input gradients for a random output gradient."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in candidate.inputs.items()}
    with hardware.autocast():
        output = candidate.call(function, leaves)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    gradient = gradient.bfloat16().to(output)  # Use the same values in every precision.
    gradients = torch.autograd.grad(output, list(leaves.values()), gradient, allow_unused=True)
    named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"output": output.detach(), **named}


def _error(value: Tensor, exact: Tensor) -> float:
    """Return the relative L2 error; NaN if a value is not finite."""
    return float((value.float() - exact).norm() / (exact.norm() or 1))
