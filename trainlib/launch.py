"""From a command line to a run: settings, the run's folder, and what may not be overwritten."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import nn

from trainlib.checkpoint import Checkpoints
from trainlib.config import HARDWARE_KEYS, load_config, recipe, write_run_yaml
from trainlib.errors import UserError
from trainlib.files import move_aside
from trainlib.help import help_text
from trainlib.metrics import MetricsLog
from trainlib.runtime import Hardware, choose_hardware, set_matmul_precision

log = logging.getLogger(__name__)
HOW = {"recipe": False}  # Such a setting changes how a run is carried out, not what is learned.


@dataclass(frozen=True)
class RunConfig:
    """Settings that every stage has."""

    LENGTH_KEYS: ClassVar = ("max_steps", "max_tokens", "epochs")
    GROUPS: ClassVar = {
        "length": (*LENGTH_KEYS, "tokens_per_step", "sequence_length"),
        "hardware": HARDWARE_KEYS,
        "evaluation and saving": (
            *("eval_every_steps", "save_every_steps", "log_every_steps", "keep_checkpoints"),
        ),
    }
    """Titles under which --help lists keys; those of no group are settings of the run."""

    out_dir: str = field(default="", metadata=HOW)
    """Folder of the run."""
    init_from: str = ""
    """Model folder that training starts from; empty = from nothing."""
    resume: str = field(default="auto", metadata=HOW)
    """auto: go on with an unfinished run; never: move it aside; or the path of a step folder."""
    seed: int = 0
    """Seed of initial weights and of the order of the data."""
    device: Literal["auto", "cpu", "cuda", "mps"] = field(default="auto", metadata=HOW)
    """Where to compute; auto = cuda where there is a card, else cpu."""
    precision: Literal["auto", "fp32", "bf16"] = field(default="auto", metadata=HOW)
    """Numbers of the forward pass; auto = bf16 on cards that have it, else fp32."""
    compile: Literal["auto", "on", "off"] = field(default="auto", metadata=HOW)
    """Compile the layers; auto = on a card only."""
    micro_batch_size: int = field(default=0, metadata=HOW)
    """Most rows of one forward pass; 0 = chosen for the device."""
    max_steps: int = 0
    """Length in optimizer steps (0 = not given)."""
    max_tokens: int = 0
    """Length in positions, tokens_per_step each step (0 = not given)."""
    epochs: int = 0
    """Length in passes over the training data (0 = not given)."""
    tokens_per_step: int = 131072
    """Positions of one optimizer step."""
    sequence_length: int = 512
    """Positions of a row; of DPO, of each of the two answers."""
    eval_every_steps: int = field(default=200, metadata=HOW)
    """Steps between evaluations; 0 = only at the start and the end."""
    save_every_steps: int = field(default=200, metadata=HOW)
    """Steps between checkpoints; 0 = only when stopped and at the end."""
    log_every_steps: int = field(default=10, metadata=HOW)
    """Steps between lines of the log."""
    keep_checkpoints: int = field(default=2, metadata=HOW)
    """Newest step folders that are kept."""

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise ValueError("; ".join(problems))

    def problems(self) -> list[str]:
        """What no run can be carried out with, one text each; a stage adds its own."""
        problems = [
            f"{key}={getattr(self, key)} must be at least {least}"
            for key, least in (
                ("tokens_per_step", 1), ("sequence_length", 2), ("log_every_steps", 1),
                ("keep_checkpoints", 1), ("max_steps", 0), ("max_tokens", 0), ("epochs", 0),
                ("micro_batch_size", 0), ("eval_every_steps", 0), ("save_every_steps", 0),
            )
            if getattr(self, key) < least
        ]  # fmt: skip
        given = [key for key in self.LENGTH_KEYS if getattr(self, key)]
        if len(given) != 1:
            problems.append(f"give the length by one of {', '.join(self.LENGTH_KEYS)}, not "
                            f"{' and '.join(given) or 'none'}")  # fmt: skip
        return problems


@dataclass
class Run:
    """Where and how a run is carried out."""

    config: Any
    stage: str
    folder: Path
    hardware: Hardware
    checkpoints: Checkpoints
    resume_from: Path | None
    metrics: MetricsLog = None  # type: ignore[assignment]  # Opened by fit, at the step it begins.


ConfigT = TypeVar("ConfigT", bound=RunConfig)


def launch(
    cls: type[ConfigT], stage: str, prepare: Callable[[Any], Any], main: Callable[..., None]
) -> None:
    """Run a stage's command line: read the settings, make the caches, train.

    A UserError is printed without a traceback; then, as for any failure, the exit code is 1.
    """
    argv = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    try:
        default_file = Path("configs") / f"{stage}.yaml"
        if {"--help", "-h"} & set(argv):
            named = [Path(word) for word in argv if word.endswith((".yaml", ".yml"))]
            print(help_text(cls, Path(sys.argv[0]).name, stage, (named or [default_file])[0]))
            return
        only_prepare = "--prepare-only" in argv
        argv = [argument for argument in argv if argument != "--prepare-only"]
        config = load_config(cls, argv, default_file)
        datasets = prepare(config)
        if only_prepare:
            print("the token caches are ready")
        else:
            main(config, datasets)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        os._exit(1)


def start_run(config: RunConfig, stage: str, data_key: str, row_length: int) -> Run:
    """Claim the run's folder and choose the hardware.

    Raises UserError where the folder holds a finished run or one of another recipe or other data;
    nothing is written then.
    """
    folder = Path(config.out_dir)
    hardware = choose_hardware(
        config.device, config.precision, config.compile, config.micro_batch_size, row_length
    )
    resume_from = _claim(folder, config, data_key)
    set_matmul_precision(hardware)
    torch.manual_seed(config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_run_yaml(config, folder / "run.yaml")
    identity = json.dumps({"recipe": recipe(config), "data": data_key}, ensure_ascii=False)
    (folder / "identity.json").write_text(identity, encoding="utf-8")
    log.info("%s in %s on %s, %s", stage, folder, hardware.device, hardware.precision)
    checkpoints = Checkpoints(folder, config.keep_checkpoints)
    return Run(config, stage, folder, hardware, checkpoints, resume_from)


def prepare_model(
    run: Run, model: nn.Module, layers: nn.ModuleList, companions: dict[str, str]
) -> None:
    """Move the model to the run's device and compile its layers in place; nothing wraps it.

    `companions` are the files that make a checkpoint a model folder: file name to content.
    """
    model.to(run.hardware.device)
    run.checkpoints.companions = companions
    if run.hardware.compile:
        log.info("compiling the layers at the first step, once (about half a minute on a CPU)")
        for layer in layers:
            layer.compile(fullgraph=True, dynamic=False)


def _claim(folder: Path, config: RunConfig, data_key: str) -> Path | None:
    """The step folder to go on from, or None for a fresh start in a free folder."""
    if config.resume not in ("auto", "never"):
        step_folder = Path(config.resume)
        if not (step_folder / "train_state.json").is_file():
            raise UserError(f"resume={step_folder} is no step folder (it has no train_state.json)")
        inside = step_folder.resolve().parent == folder.resolve()
        if (folder / "final").is_dir() or not inside and folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"{folder} holds a run already, which resume={step_folder} would overwrite; "
                "give another folder by out_dir=NEW"
            )
        return step_folder
    identity_file = folder / "identity.json"
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if config.resume == "never":
        log.info("moved the run that was in %s to %s", folder, move_aside(folder))
        return None
    ways = (
        f"Three ways on:\n  out_dir=NEW                    train into another folder\n"
        f"  resume=never                   move {folder} to {folder}.1 (or .2, ...) first\n"
        f"  init_from={folder}/final   start a new run from its model (with out_dir=NEW)"
    )
    if not identity_file.is_file():
        raise UserError(f"{folder} holds files, but no run of this program. {ways}")
    was = json.loads(identity_file.read_text(encoding="utf-8"))
    if (folder / "final").is_dir():
        raise UserError(f"{folder} holds a finished run. {ways}")
    now = {"recipe": json.loads(json.dumps(recipe(config))), "data": data_key}
    differing = sorted(
        f"{key}: {was['recipe'].get(key)!r} there, {now['recipe'].get(key)!r} now"
        for key in {*was["recipe"], *now["recipe"]}
        if was["recipe"].get(key) != now["recipe"].get(key)
    )
    if was["data"] != now["data"]:
        differing.append("the data files or the tokenizer have changed")
    if differing:
        raise UserError(
            f"{folder} holds an unfinished run of another recipe:\n  "
            + "\n  ".join(differing)
            + f"\n{ways}"
        )
    latest = folder / "latest"
    return folder if latest.is_file() or any(folder.glob("step_*")) else None
