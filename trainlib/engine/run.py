"""The settings that every stage has, and where and how a run executes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from trainlib.core.distributed import DistributedContext
from trainlib.core.settings import HARDWARE_KEYS
from trainlib.engine.control import Clock
from trainlib.engine.device import Hardware
from trainlib.engine.optim import OptimConfig

EXECUTION_ONLY = {"recipe": False}
"""Execution settings: they change how a run executes, not what the model learns."""
STAGES = {"pretrain": "train.py", "sft": "sft_train.py", "dpo": "dpo_train.py"}
"""The script of each stage, in the order in which they follow each other."""


@dataclass(frozen=True)
class RunConfig:
    """Settings that every stage has."""

    LENGTH_KEYS: ClassVar = ("max_steps", "max_tokens", "epochs", "max_hours")
    GROUPS: ClassVar = {
        "length": (*LENGTH_KEYS, "tokens_per_step", "sequence_length"),
        "hardware": HARDWARE_KEYS,
        "evaluation and saving": (
            *("eval_every_steps", "save_every_steps", "log_every_steps", "keep_checkpoints"),
        ),
    }
    """Titles under which --help lists keys; those of no group are settings of the run."""

    out_dir: str = field(default="", metadata=EXECUTION_ONLY)
    """Folder of the run."""
    init_from: str = ""
    """Model folder that training starts from; empty = from nothing."""
    resume: str = field(default="auto", metadata=EXECUTION_ONLY)
    """auto: go on with an unfinished run; never: move it aside; or the path of a step folder."""
    seed: int = 0
    """Seed of initial weights and of the order of the data."""
    device: Literal["auto", "cpu", "cuda", "mps"] = field(default="auto", metadata=EXECUTION_ONLY)
    """Where to compute; auto = cuda where there is a card, else cpu."""
    ranks: int = field(default=0, metadata={**EXECUTION_ONLY, "at_least": 0})
    """Processes that train together on this host; 0 = one for each visible card, else one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = field(
        default="auto", metadata=EXECUTION_ONLY
    )
    """Numbers of the forward pass; auto = by the card, on a CPU what a measurement finds faster."""
    compile: Literal["auto", "on", "off"] = field(default="auto", metadata=EXECUTION_ONLY)
    """Compile the layers; auto = on a card, and on a CPU in bf16 for a long run of given steps."""
    kernels: Literal["auto", "plain"] = field(default="auto", metadata=EXECUTION_ONLY)
    """Kernels that replace formulas of model.py; auto = where they agree with them, else plain."""
    micro_batch_size: int = field(default=0, metadata={**EXECUTION_ONLY, "at_least": 0})
    """Most rows of one forward pass; 0 = chosen for the device."""
    max_steps: int = field(default=0, metadata={"at_least": 0})
    """Length in optimizer steps (0 = not given)."""
    max_tokens: int = field(default=0, metadata={"at_least": 0})
    """Length in positions, tokens_per_step each step (0 = not given)."""
    epochs: int = field(default=0, metadata={"at_least": 0})
    """Length in passes over the training data (0 = not given)."""
    max_hours: float = field(default=0.0, metadata={"at_least": 0})
    """Length in hours, those before a resume included (0 = not given)."""
    tokens_per_step: int = field(default=131072, metadata={"at_least": 1})
    """Positions of one optimizer step."""
    sequence_length: int = field(default=512, metadata={"at_least": 2})
    """Positions of a row; of DPO half of one, which both answers of a pair share."""
    eval_every_steps: int = field(default=200, metadata={**EXECUTION_ONLY, "at_least": 0})
    """Steps between evaluations; 0 = only at the start and the end."""
    save_every_steps: int = field(default=200, metadata={**EXECUTION_ONLY, "at_least": 0})
    """Steps between checkpoints; 0 = only when stopped and at the end."""
    log_every_steps: int = field(default=10, metadata={**EXECUTION_ONLY, "at_least": 1})
    """Steps between lines of the log."""
    keep_checkpoints: int = field(default=2, metadata={**EXECUTION_ONLY, "at_least": 1})
    """Newest step folders that are kept."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizers and schedule."""

    def validation_errors(self) -> list[str]:
        """Return what makes these settings unusable, one message each; stages extend the list."""
        given = [key for key in self.LENGTH_KEYS if getattr(self, key)]
        if len(given) == 1:
            return []
        keys, found = ", ".join(self.LENGTH_KEYS), " and ".join(given) or "none"
        return [f"give the length by one of {keys}, not {found}"]


@dataclass(frozen=True)
class Run:
    """Where and how a run executes."""

    config: RunConfig
    stage: str
    folder: Path
    hardware: Hardware
    distributed: DistributedContext
    clock: Clock
    resume_from: Path | None
    """The step folder to resume from."""
