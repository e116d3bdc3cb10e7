"""Optimizers, and the schedule of a run: its length and learning rate.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the matrices inside the blocks,
AdamW (arXiv:1711.05101) for embeddings and norms, or for everything. The loop, the schedule
and the checkpoint accept a list of optimizers of any class.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from trainlib.core.hardware import cpu_has_bf16


@dataclass(frozen=True)
class OptimConfig:
    """Settings of the optimizers and the schedule."""

    name: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the matrices, AdamW for the rest; adamw: AdamW for all parameters."""
    muon_lr: float = field(default=0.02, metadata={"above": 0})
    """Peak learning rate of the matrices under Muon, relative to an orthogonal update."""
    adamw_lr: float = field(default=3e-3, metadata={"above": 0})
    """Peak learning rate of the matrices with optim.name=adamw."""
    embedding_lr: float = field(default=8e-3, metadata={"above": 0})
    """Peak learning rate of embeddings and norms, which always use AdamW."""
    weight_decay: float = field(default=0.0, metadata={"at_least": 0})
    """Decoupled weight decay of the matrices; embeddings and norms have none."""
    momentum: float = field(default=0.95, metadata={"at_least": 0, "below": 1})
    """Momentum of Muon (Nesterov)."""
    beta1: float = field(default=0.9, metadata={"at_least": 0, "below": 1})
    """First-moment decay of AdamW."""
    beta2: float = field(default=0.95, metadata={"at_least": 0, "below": 1})
    """Second-moment decay of AdamW."""
    grad_clip: float = field(default=1.0, metadata={"at_least": 0})
    """Maximum norm of the gradient over all parameters; 0 = no clipping."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """wsd: warmup, constant, linear decay; cosine: warmup, then half a cosine."""
    warmup_fraction: float = field(default=0.01, metadata={"at_least": 0, "at_most": 1})
    """Fraction of the steps in which the learning rate rises from near 0 to its peak."""
    decay_fraction: float = field(default=0.5, metadata={"at_least": 0, "at_most": 1})
    """Fraction of the steps in which wsd decays the learning rate."""
    final_lr_fraction: float = field(default=0.0, metadata={"at_least": 0, "at_most": 1})
    """Learning rate at the end, as a fraction of the peak."""

    def validation_errors(self) -> list[str]:
        """Return one message for each invalid combination of settings."""
        warmup, decay = self.warmup_fraction, self.decay_fraction
        if self.schedule != "wsd" or max(warmup, decay) > 1 or warmup + decay <= 1:
            return []
        both = f"optim.warmup_fraction={warmup} and optim.decay_fraction={decay}"
        return [f"the sum of {both} must be at most 1"]


def fast_bfloat16(device: torch.device) -> bool:
    """Return whether matmuls on this device are faster in bfloat16 than in fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Without bf16 instructions, 512 x 512 Newton-Schulz took 2.2 s in bf16, 0.03 s in fp32.
    return device.type == "cpu" and cpu_has_bf16()


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Replace singular values with values near 1 by quintic Newton-Schulz: (M, rows, columns)."""
    a, b, c = 3.4445, -4.7750, 2.0315  # As in the Muon post and torch.optim.Muon.
    x = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Muon):
    """torch.optim.Muon that orthogonalizes matrices of equal shape together, in the faster dtype.

    torch.optim.Muon orthogonalizes one matrix at a time, always in bfloat16, 40 to 70 times slower
    than fp32 on a CPU without bfloat16 instructions. A test checks that the results are the same.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[tuple(parameter.shape)].append(parameter)
            for (rows, columns), parameters in by_shape.items():
                self._step_shape(group, parameters, math.sqrt(max(1.0, rows / columns)))

    def _step_shape(self, group: dict[str, Any], parameters: list, lr_ratio: float) -> None:
        momentum, gradients = group["momentum"], [p.grad for p in parameters]
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        updates = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(updates, gradients, 1 - momentum)  # pyright: ignore
        if group["nesterov"]:
            updates = torch._foreach_lerp(gradients, updates, momentum)  # pyright: ignore
        device = parameters[0].device
        dtype = torch.bfloat16 if fast_bfloat16(device) else torch.float32
        update = orthogonalize(torch.stack(updates), group["ns_steps"], dtype)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])  # pyright: ignore
        torch._foreach_add_(parameters, update.unbind(), alpha=-group["lr"] * lr_ratio)  # pyright: ignore


def block_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the matrices inside the blocks, which Muon updates."""
    outside = ("embed", "lm_head")
    return [parameter for name, parameter in model.named_parameters()
            if parameter.ndim == 2 and not any(part in name for part in outside)]  # fmt: skip


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[Optimizer]:
    """Build the optimizers; Schedule.set_rates sets the rate of a group from its "peak_lr"."""
    matrices = block_matrices(model)
    inside = set(map(id, matrices))
    others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    decay, betas = config.weight_decay, (config.beta1, config.beta2)
    optimizers: list[Optimizer] = []
    groups = [{"params": others, "lr": config.embedding_lr, "weight_decay": 0.0}]
    if config.name == "muon":
        muon = Muon(matrices, config.muon_lr, decay, config.momentum, adjust_lr_fn="original")
        optimizers.append(muon)
    else:
        groups.insert(0, {"params": matrices, "lr": config.adamw_lr, "weight_decay": decay})
    optimizers.append(AdamW(groups, betas=betas, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


OPEN_WARMUP_STEPS = 20  # Warmup steps of a run with a time limit, whose number of steps is unknown.


class Schedule:
    """Length of a run, and its learning rate by step; it is constant if the length is unknown."""

    def __init__(self, config: OptimConfig, num_steps: int | None) -> None:
        self.config, self.num_steps = config, num_steps
        self.decay: tuple[int, float, int] | None = None  # First step, factor there, last step.
        self.warmup = OPEN_WARMUP_STEPS
        if num_steps is not None:
            self.warmup = max(1, round(config.warmup_fraction * num_steps))

    def begin_decay(self, step: int, num_steps: int) -> None:
        """Decay linearly from the current rate to the final one, which is reached at num_steps."""
        self.restore((step, self.factor(step), num_steps))

    def restore(self, decay: tuple[int, float, int] | None) -> None:
        """Restore a decay that began before a resume."""
        if decay is not None:
            self.decay, self.num_steps = decay, decay[2]

    def factor(self, step: int) -> float:
        """Return the learning rate at a step, counted from 0, as a fraction of the peak."""
        c = self.config
        if self.decay is not None:
            begin, high, end = self.decay
            left = max(0.0, (end - step) / max(1, end - begin))
            return c.final_lr_fraction + (high - c.final_lr_fraction) * left
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.num_steps is None:
            return 1.0
        if c.schedule == "wsd":
            length = max(1.0, c.decay_fraction * self.num_steps)
            left = min(1.0, (self.num_steps - step) / length) if c.decay_fraction else 1.0
        else:
            done = (step - self.warmup) / max(1, self.num_steps - self.warmup)
            left = 0.5 * (1 + math.cos(math.pi * done))
        return c.final_lr_fraction + (1 - c.final_lr_fraction) * left

    def reached(self, step: int) -> bool:
        """Return whether the run is complete after `step` steps."""
        return self.num_steps is not None and step >= self.num_steps

    def set_rates(self, optimizers: list[Optimizer], step: int) -> float:
        """Set the learning rate of each parameter group for a step; return the first group's."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * self.factor(step)
        return optimizers[0].param_groups[0]["lr"]
