"""The files that models are measured on: --data, or the validation files of their runs.

A run names the model that it started from (init_from), so the run of a DPO model leads to the
files of SFT and of pretraining. Where a run's files are missing, the sample's are used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from dataset import DATASET_DIR, DataConfig, choose_files, expand, load_datasets
from tokenizer.bpe import Tokenizer
from trainlib.core.errors import UserError
from trainlib.data.encode import ENCODERS
from trainlib.data.formats import Format, detect
from trainlib.data.packing import Datasets
from trainlib.engine.run_folder import read_identity

LONGEST = 2048
"""Positions of a row if no run says how many, or the model's context if that is shorter."""


@dataclass(frozen=True)
class Data:
    """The data settings for one kind of rows: pretrain, sft or dpo."""

    config: DataConfig
    sequence_length: int = LONGEST
    seed: int = 0
    has_training: bool = True
    """False if there are no training files, from which baselines are counted."""


def run_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the stage and the settings of the run that a model comes from; empty if unknown."""
    # The run folder has full paths; a copied model folder has only its own run.yaml.
    in_run = folder.name in ("final", "best") or folder.name.startswith("step_")
    for place in (folder.parent, folder) if in_run else (folder,):
        path = place / "run.yaml"
        if path.is_file():
            try:
                settings = yaml.safe_load(path.read_text(encoding="utf-8"))
                stage = read_identity(place).get("stage", "")
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise UserError(f"{path} cannot be read: {error}. Remove or replace it.") from error
            # Only pretraining has the section `model`, and only DPO has beta.
            found = "pretrain" if "model" in settings else "dpo" if "beta" in settings else "sft"
            return stage or found, settings
    return "", {}


def _runs(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the run of a model, and of the models that it was started from."""
    seen = set()
    while folder.is_dir() and folder.resolve() not in seen:
        seen.add(folder.resolve())
        stage, settings = run_of(folder)
        if not stage:
            return
        yield stage, settings
        folder = Path(settings.get("init_from") or "no model")


def _config(settings: dict[str, Any]) -> DataConfig:
    """Return the data settings in a run.yaml."""
    known, given = {field.name for field in fields(DataConfig)}, settings.get("data", {})
    values: dict[str, Any] = {name: value for name, value in given.items() if name in known}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return DataConfig(**values)


def _configs(folders: Sequence[Path]) -> Iterator[tuple[str, DataConfig]]:
    """Yield stage and data settings of the runs that led to the models."""
    for stage, settings in (run for folder in folders for run in _runs(folder)):
        yield stage, _config(settings)


def _detect(path: Path, folders: Sequence[Path]) -> Format:
    """Return the format of a file; if it has none of its own, as a run of the models read it."""
    try:
        return detect(path).format
    except UserError:
        for _, config in _configs(folders):
            with contextlib.suppress(UserError):
                return detect(path, None, config.format, config.columns).format
        raise


def _of_run(stage: str, settings: dict[str, Any]) -> Data | None:
    """Return a run's data; None if a file is missing."""
    config = replace(_config(settings), val_max_rows=0)
    try:
        files = choose_files(config, stage)
    except UserError:
        return None
    if not all(path.is_file() for group in (*files.train, *files.val) for path in group.paths):
        return None
    return Data(config, settings.get("sequence_length", LONGEST), settings.get("seed", 0))


def _of_sample(kind: str) -> Data | None:
    """Return the sample's data; None if it is missing."""
    folder = DATASET_DIR / "sample"
    train, val = folder / f"{kind}.jsonl", sorted((folder / "val" / kind).glob("*.jsonl"))
    if not train.is_file() or not val:
        return None
    return Data(DataConfig(files=(str(train),), val_files=tuple(map(str, val))))


def default_data(folders: Sequence[Path], kinds: Sequence[str]) -> dict[str, Data]:
    """Return the data of each kind: that of the first run that has it, else the sample's.

    Raises UserError if there is none.
    """
    found: dict[str, Data] = {}
    for stage, settings in (run for folder in folders for run in _runs(folder)):
        if stage in kinds and stage not in found and (data := _of_run(stage, settings)):
            found[stage] = data
    for kind in kinds:
        if kind not in found and (data := _of_sample(kind)):
            found[kind] = data
    if not found:
        raise UserError(
            "no validation files: those of the model's run do not exist, and there is no sample. "
            "Pass --data FILE, or run python -m tools.prepare_data."
        )
    return {kind: found[kind] for kind in kinds if kind in found}


def named_data(names: Sequence[str], folders: Sequence[Path]) -> dict[str, Data]:
    """Return --data's files by kind, with the training files of the models' runs or the sample."""
    paths: dict[str, list[str]] = {}
    for name in names:
        for path in expand(name):
            if not path.is_file():
                raise UserError(f"--data {path} does not exist")
            format_ = _detect(path, folders)
            if format_.kind not in ENCODERS:
                raise UserError(f"--data {path} has {format_.name} rows, which cannot be measured")
            paths.setdefault(format_.kind, []).append(str(path))
    found = {}
    for kind, files in paths.items():
        try:
            runs = default_data(folders, [kind])[kind]
        except UserError:
            runs = Data(DataConfig(files=tuple(files)), has_training=False)
        read = next((config for stage, config in _configs(folders) if stage == kind), DataConfig())
        config = replace(read, files=runs.config.files, val_files=tuple(files), val_max_rows=0)
        if not config.files:  # The run chose its files itself; so do we.
            config = replace(config, files=tuple(files))
            runs = replace(runs, has_training=False)
        found[kind] = Data(config, LONGEST, has_training=runs.has_training)
    return found


def is_pretrained(folder: Path) -> bool:
    """Return whether a model is known to be only pretrained, so that it has learned no chat."""
    return run_of(folder)[0] == "pretrain"


def load(data: Data, kind: str, tokenizer: Tokenizer, context: int) -> Datasets:
    """Tokenize and pack the data for a model with `context` positions."""
    length = min(data.sequence_length, context)
    return load_datasets(data.config, kind, tokenizer, length, data.seed)
