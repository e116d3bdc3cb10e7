"""Command line of a stage: read the settings, prepare the data, then train or print a plan."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
import yaml

from tokenizer.bpe import Tokenizer
from trainlib.core.distributed import (
    destroy_distributed,
    init_distributed,
    is_launched_process,
    launch_processes,
    resolve_world_size,
    run_on_main_process,
)
from trainlib.core.errors import AlreadyFinished, UserError
from trainlib.core.files import cache_dir, release_folders, write_atomically
from trainlib.core.hardware import choose_hardware, find_facts, measured_precision, unseen_card
from trainlib.core.help import help_text
from trainlib.core.settings import load_config, provenance, recipe, resolved, run_yaml
from trainlib.core.terminal import survive_a_dead_terminal
from trainlib.data.formats import STAGES
from trainlib.data.loader import micro_batch_shape
from trainlib.data.packing import Datasets
from trainlib.engine.control import Clock
from trainlib.engine.device import use_hardware
from trainlib.engine.loop import fit
from trainlib.engine.plan import CONFIGS, plan_request, print_plan
from trainlib.engine.run import Run, RunConfig
from trainlib.engine.run_folder import IDENTITY, acquire_run_folder
from trainlib.engine.training import Training
from trainlib.models.hf_folder import weights_digest

log = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def launch(
    cls: type[ConfigT],
    stage: str,
    prepare: Callable[[ConfigT], tuple[ConfigT, Tokenizer, Datasets]],
    main: Callable[[ConfigT, Tokenizer, Datasets], Training],
) -> None:
    """Run a stage from the command line: read the settings, build the caches, then train or plan.

    `prepare` returns the resolved settings, the tokenizer and the data. `main` returns the training
    to run. A UserError is printed without a traceback; the exit code is 1, as for any failure.
    """
    argv = sys.argv[1:]
    survive_a_dead_terminal()
    first = int(os.environ.get("RANK", 0)) == 0
    level = logging.INFO if first else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout, force=True)
    try:
        default_file = Path("configs") / f"{stage}.yaml"
        if {"--help", "-h"} & set(argv):
            named = [Path(word) for word in argv if word.endswith((".yaml", ".yml"))]
            print(help_text(cls, Path(sys.argv[0]).name, stage, (named or [default_file])[0]))
            return
        refuse_other_stage(argv, stage)
        request, argv = plan_request(argv)
        only_prepare = "--prepare-only" in argv
        argv = [argument for argument in argv if argument != "--prepare-only"]
        config = load_config(cls, argv, default_file)
        if request is not None:
            print_plan(config, stage, request)
            return
        prepared = prepare(config)
        if only_prepare:
            print("the token caches are ready")
        elif not is_launched_process() and (count := resolve_world_size(config)) > 1:
            log.info("starting %d ranks, one process each (set ranks=1 to use only one)", count)
            sys.exit(launch_processes(count))
        elif fit(training := main(*prepared)):
            print_next(training.run)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        sys.exit(
            f"error: out of memory on the card ({reason}). Set a smaller micro_batch_size; this "
            "does not change what the model learns."
        )
    except AlreadyFinished as finished:
        log.info("%s", finished)
    except UserError as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        elif not error.reported:
            print(f"error on rank {os.environ['RANK']}: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        release_folders()
        destroy_distributed()


def refuse_other_stage(argv: list[str], stage: str) -> None:
    """Raise UserError for a file in configs/ that belongs to another stage."""
    for file in (Path(word) for word in argv if word.endswith((".yaml", ".yml"))):
        name = file.stem.removeprefix("tiny_")
        for other, script in STAGES.items():
            mismatch = other != stage and name.startswith(other)
            if mismatch and file.resolve().parent == CONFIGS:
                raise UserError(
                    f"{file} contains settings for {script}. Run `python {script} {file} ...`, or "
                    f"pass configs/tiny_{stage}.yaml or your own file to {STAGES[stage]}."
                )


def print_next(run: Run) -> None:
    """Log the command for the next stage, with its tiny recipe if this run used one."""
    tiny = f"configs/tiny_{run.stage}.yaml:"
    small = any(source.startswith(tiny) for source in provenance(run.config).values())
    chat = f"python chat.py --model {run.folder}/final"
    later = list(STAGES)[list(STAGES).index(run.stage) + 1 :]
    if later:
        file = f"configs/tiny_{later[0]}.yaml " if small else ""
        log.info("next: python %s %sinit_from=%s/final", STAGES[later[0]], file, run.folder)
    if run.stage != "pretrain":
        log.info("%s: %s", "or chat with it" if later else "next", chat)


def start_run(config: RunConfig, stage: str, data_key: str, row_length: int) -> Run:
    """Acquire the run folder and choose the hardware.

    If the same run has already finished in the folder, writes nothing and raises AlreadyFinished.
    Raises UserError if the folder holds a run with another recipe or other data.
    """
    folder = Path(config.out_dir)
    base = weights_digest(config.init_from) if config.init_from else None
    identity = {"stage": stage, "recipe": recipe(config), "data": data_key, "base": base}
    distributed = init_distributed(config.device)
    if config.tokens_per_step < row_length and distributed.is_main:
        log.warning("tokens_per_step=%s is less than a row, so a step is one row of %s positions",
                    config.tokens_per_step, row_length)  # fmt: skip
    hardware = choose_hardware(
        find_facts(), device=config.device, precision=config.precision, compile_=config.compile,
        micro_batch_size=config.micro_batch_size, row_length=row_length,
    )  # fmt: skip
    check_card = config.device == "auto" and hardware.device.type == "cpu" and distributed.is_main
    if check_card and (warning := unseen_card()):
        log.warning("%s", warning)
    resume_from = run_on_main_process(
        distributed, lambda: acquire_run_folder(folder, config.resume, identity)
    )
    if hardware.precision == "measure":
        precision = run_on_main_process(
            distributed, lambda: _precision(folder, resume_from, hardware.matmul)
        )
        hardware = replace(hardware, precision=precision)
    # Resolved for run.yaml, because a resumed run must use the same precision.
    config = resolved(config, precision=hardware.precision)
    hardware = use_hardware(hardware, distributed.local_rank)
    rows_per_step = max(1, config.tokens_per_step // row_length)
    # Evaluation uses the same number of rows as training, so that layers compile for one shape.
    _, rows = micro_batch_shape(rows_per_step, hardware.micro_batch_size, distributed.world_size)
    hardware = replace(hardware, micro_batch_size=rows)
    torch.manual_seed(config.seed)
    if distributed.is_main:
        if resume_from is not None and resume_from.parent.resolve() == folder.resolve():
            # The next checkpoint follows this one, even if the folder has later ones.
            write_atomically(folder / "latest", resume_from.name)
        write_atomically(folder / IDENTITY, json.dumps(identity, ensure_ascii=False))
        write_atomically(folder / "run.yaml", run_yaml(config))
    log.info("%s in %s on %s, %s", stage, folder, hardware.device, hardware.precision)
    return Run(config, stage, folder, hardware, distributed, Clock(config.max_hours), resume_from)


def _precision(folder: Path, resume_from: Path | None, matmul: str) -> str:
    """Return the resumed run's precision; for a new run, the faster one on this CPU."""
    path = folder / "run.yaml"
    if resume_from is not None and path.is_file():
        previous = yaml.safe_load(path.read_text(encoding="utf-8")).get("precision")
        if previous in ("fp32", "bf16"):
            return previous
    return measured_precision(cache_dir() / "hardware.json", matmul)
