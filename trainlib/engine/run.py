"""Settings common to all stages, and the context in which a run executes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from trainlib.core.distributed import DistributedContext
from trainlib.core.hardware import Hardware
from trainlib.core.settings import HARDWARE_KEYS
from trainlib.engine.control import Clock, Control
from trainlib.engine.optim import OptimConfig

EXECUTION_ONLY = {"recipe": False}  # They change how a run executes, not what the model learns.


@dataclass(frozen=True)
class RunConfig:
    """Settings common to all stages."""

    LENGTH_KEYS: ClassVar = ("max_steps", "max_tokens", "epochs", "max_hours")
    GROUPS: ClassVar = {
        "length": (*LENGTH_KEYS, "tokens_per_step", "sequence_length"),
        "hardware": HARDWARE_KEYS,
        "evaluation and saving": (
            *("eval_every_steps", "save_every_steps", "log_every_steps"),
            *("keep_checkpoints", "keep_best"),
        ),
    }
    """Titles under which --help lists keys; keys without a group are listed under "run"."""

    out_dir: str = field(default="", metadata=EXECUTION_ONLY)
    """Folder of the run."""
    init_from: str = ""
    """Model folder to start training from; empty = random weights."""
    resume: str = field(default="auto", metadata=EXECUTION_ONLY)
    """auto: resume an unfinished run; never: move it aside; or a step folder to resume from."""
    seed: int = 0
    """Seed for the initial weights and the order of the data."""
    device: Literal["auto", "cpu", "cuda", "mps"] = field(default="auto", metadata=EXECUTION_ONLY)
    """Device to train on; auto = cuda if there is a GPU, else cpu."""
    ranks: int = field(default=0, metadata={**EXECUTION_ONLY, "at_least": 0})
    """Number of data-parallel processes on this host; 0 = one per visible GPU, or one on a CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = field(
        default="auto", metadata=EXECUTION_ONLY
    )
    """Precision of the forward pass; auto = by GPU type; on a CPU, the faster of fp32 and bf16."""
    compile: Literal["auto", "on", "off"] = field(default="auto", metadata=EXECUTION_ONLY)
    """Compile the layers; auto = on GPUs, and on a CPU for long bf16 runs of known length."""
    kernels: Literal["auto", "plain"] = field(default="auto", metadata=EXECUTION_ONLY)
    """Kernels that replace the formulas in model.py; auto = all that agree; plain = none."""
    micro_batch_size: int = field(default=0, metadata={**EXECUTION_ONLY, "at_least": 0})
    """Maximum number of rows in one forward pass; 0 = chosen for the device."""
    max_steps: int = field(default=0, metadata={"at_least": 0})
    """Length of the run in optimizer steps (0 = not set)."""
    max_tokens: int = field(default=0, metadata={"at_least": 0})
    """Length of the run in positions, tokens_per_step per step (0 = not set)."""
    epochs: int = field(default=0, metadata={"at_least": 0})
    """Length of the run in passes over the training data (0 = not set)."""
    max_hours: float = field(default=0.0, metadata={"at_least": 0})
    """Length of the run in hours, including the time before a resume (0 = not set)."""
    tokens_per_step: int = field(default=131072, metadata={"at_least": 1})
    """Positions per optimizer step."""
    sequence_length: int = field(default=512, metadata={"at_least": 2})
    """Positions per row; for DPO, rows are twice as long and hold both answers of a pair."""
    eval_every_steps: int | Literal["auto"] = field(
        default="auto", metadata={**EXECUTION_ONLY, "at_least": 0}
    )
    """Steps between evaluations; auto = about ten evaluations, fewer if they would take more than a
    tenth of the run; 0 = only at the start and the end."""
    save_every_steps: int = field(default=200, metadata={**EXECUTION_ONLY, "at_least": 0})
    """Steps between checkpoints; 0 = only when the run stops or ends."""
    log_every_steps: int = field(default=10, metadata={**EXECUTION_ONLY, "at_least": 1})
    """Steps between log lines."""
    keep_checkpoints: int = field(default=2, metadata={**EXECUTION_ONLY, "at_least": 1})
    """Number of step folders to keep; older ones are deleted."""
    keep_best: bool = field(default=False, metadata=EXECUTION_ONLY)
    """Keep the weights with the smallest val/loss after step 0 in best/, and write them to final/
    unless the last ones are within one standard error; off = always the last ones."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizers and schedule."""

    def validation_errors(self) -> list[str]:
        """Return one message for each invalid combination of settings; stages extend the list."""
        lengths = [key for key in self.LENGTH_KEYS if getattr(self, key)]
        if len(lengths) == 1:
            return []
        keys, found = ", ".join(self.LENGTH_KEYS), " and ".join(lengths) or "none"
        return [f"set the length with one of {keys}; found {found}"]


@dataclass(frozen=True)
class Run:
    """A run: its settings, folder, hardware, processes, clock and signals."""

    config: RunConfig
    stage: str
    folder: Path
    hardware: Hardware
    distributed: DistributedContext
    clock: Clock
    control: Control
    resume_from: Path | None
    """The step folder to resume from, if any."""

    def chose_checkpoint(self) -> bool:
        """Return whether the user chose the step folder to resume from."""
        return self.resume_from is not None and self.resume_from == Path(self.config.resume)
