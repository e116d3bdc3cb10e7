"""Command line of a stage: read the settings, prepare the data, then train or print a plan."""

import errno
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import yaml

from tokenizer.bpe import Tokenizer
from trainlib.core import distributed as ranks
from trainlib.core.errors import AlreadyFinished, Stopped, UserError
from trainlib.core.files import cache_dir, release_folders, write_atomically
from trainlib.core.hardware import choose_hardware, find_facts, measured_precision, unseen_card
from trainlib.core.help import help_text
from trainlib.core.settings import load_config, provenance, recipe, resolved, run_yaml
from trainlib.core.terminal import WaitingStream, survive_a_dead_terminal
from trainlib.data.formats import STAGES
from trainlib.data.loader import micro_batch_shape
from trainlib.data.packing import Datasets
from trainlib.engine.code import record_code, saved_settings
from trainlib.engine.control import Clock, Control
from trainlib.engine.device import Hardware, use_hardware
from trainlib.engine.loop import fit
from trainlib.engine.plan import CONFIGS, plan_request, print_plan
from trainlib.engine.run import Run, RunConfig
from trainlib.engine.run_folder import acquire_run_folder
from trainlib.engine.training import Training
from trainlib.models.hf_folder import weights_digest

log = logging.getLogger(__name__)

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)  # Full, broken, read-only.
ConfigT = TypeVar("ConfigT", bound=RunConfig)


def launch(
    cls: type[ConfigT],
    stage: str,
    prepare: Callable[[ConfigT], tuple[ConfigT, Tokenizer, Datasets]],
    main: Callable[[ConfigT, Tokenizer, Datasets], Training],
) -> None:
    """Run a stage from the command line: `prepare` its data, then train what `main` returns."""
    argv = sys.argv[1:]
    survive_a_dead_terminal()
    first = int(os.environ.get("RANK", 0)) == 0
    level = logging.INFO if first else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout, force=True)
    training = None
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
        argv = ["data.verify_cache=true" if a == "--verify-cache" else a for a in argv]
        config = load_config(cls, argv, default_file)
        if request is not None:
            print_plan(config, stage, request)
            return
        prepared = prepare(config)
        if only_prepare:
            print("the token caches are ready")
        elif not ranks.is_launched_process() and (count := ranks.resolve_world_size(config)) > 1:
            log.info("starting %d ranks, one process each (set ranks=1 to use only one)", count)
            sys.exit(ranks.launch_processes(count))
        elif fit(training := main(*prepared)):
            print_next(training.run)
    except (AlreadyFinished, Stopped) as ended:
        log.info("%s", ended)
    except BaseException as failure:
        if text := one_line(failure):
            if first or not getattr(failure, "reported", False):
                name = "error" if first else f"error on rank {os.environ['RANK']}"
                print(f"{name}: {text}", file=sys.stderr)
            else:  # Rank 0 prints it, and the first exit may end all.
                ranks.peer_lost(ranks.GRACE_SECONDS)
            failure = SystemExit(1)
        if ranks.has_process_group():
            ranks.end_failed_rank(failure, training.checkpoints.problem if training else None)
        if training is not None:
            training.checkpoints.problem(wait=True)  # Write it before the folder is unlocked.
        raise failure from failure.__cause__
    finally:
        release_folders()
    ranks.destroy_distributed()


def one_line(failure: BaseException) -> str:
    """Return what to print for a failure; empty if a traceback is needed."""
    if isinstance(failure, torch.OutOfMemoryError):
        text = f"out of memory on the card ({str(failure).splitlines()[0]}). Set a smaller "
        return text + "micro_batch_size; this does not change what the model learns."
    if isinstance(failure, OSError) and failure.errno in DISK_ERRORS:
        return f"{failure}. The last checkpoint is intact. Rerun the command to resume."
    return str(failure) if isinstance(failure, UserError) else ""


def refuse_other_stage(argv: list[str], stage: str) -> None:
    """Raise UserError for a file in configs/ that belongs to another stage."""
    for file in (Path(word) for word in argv if word.endswith((".yaml", ".yml"))):
        name = file.stem.removeprefix("tiny_")
        other = next(filter(name.startswith, STAGES), stage)
        if other != stage and file.resolve().parent == CONFIGS:
            own = f"pass configs/tiny_{stage}.yaml or your own file to {STAGES[stage]}."
            text = f"{file} contains settings for {STAGES[other]}."
            raise UserError(f"{text} Run `python {STAGES[other]} {file} ...`, or {own}")


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
    """Acquire the run folder and choose the hardware; raise AlreadyFinished if nothing is left."""
    folder = Path(config.out_dir)
    WaitingStream.everything = f"; all of them are in {folder / 'train.log'}"
    base = weights_digest(config.init_from) if config.init_from else None
    identity = {"stage": stage, "recipe": recipe(config), "data": data_key, "base": base}
    distributed = ranks.init_distributed(config.device)
    if config.tokens_per_step < row_length:
        log.warning("tokens_per_step=%s is less than a row, so a step is one row of %s positions",
                    config.tokens_per_step, row_length)  # fmt: skip
    hardware = choose_hardware(
        find_facts(), device=config.device, precision=config.precision, compile_=config.compile,
        micro_batch_size=config.micro_batch_size, row_length=row_length,
    )  # fmt: skip
    on_cpu = config.device == "auto" and hardware.device.type == "cpu"
    if on_cpu and distributed.is_main and (warning := unseen_card()):
        log.warning("%s", warning)
    acquire = partial(acquire_run_folder, folder, config.resume, identity)
    resume_from = ranks.run_on_main_process(distributed, acquire)
    precision = ranks.run_on_main_process(distributed, partial(_precision, resume_from, hardware))
    # Resolved for run.yaml, because a resumed run must use the same precision.
    config = resolved(config, precision=precision)
    hardware = use_hardware(replace(hardware, precision=precision), distributed.local_rank)
    rows_per_step = max(1, config.tokens_per_step // row_length)
    # Evaluation uses the same number of rows as training, so that layers compile for one shape.
    _, rows = micro_batch_shape(rows_per_step, hardware.micro_batch_size, distributed.world_size)
    hardware = replace(hardware, micro_batch_size=rows)
    torch.manual_seed(config.seed)
    if distributed.is_main:
        code = yaml.safe_dump({"code": record_code(folder, stage, resume_from)}, sort_keys=False)
        write_atomically(folder / "run.yaml", run_yaml(config) + code)
    log.info("%s in %s on %s, %s", stage, folder, hardware.device, hardware.precision)
    control = Control(folder, clock := Clock(config.max_hours), distributed)
    return Run(config, stage, folder, hardware, distributed, clock, control, resume_from)


def _precision(resume_from: Path | None, hardware: Hardware) -> str:
    """Return the resumed run's precision; for a new run, the faster one on this CPU."""
    if hardware.precision != "measure":
        return hardware.precision
    previous = saved_settings(resume_from).get("precision") if resume_from else None
    if previous in ("fp32", "bf16"):
        return previous
    return measured_precision(cache_dir() / "hardware.json", hardware.matmul)
