"""Decide whether to start, resume or refuse a run, and never overwrite one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from trainlib.core.errors import AlreadyFinished, UserError
from trainlib.core.files import LOCK, lock_folder, move_aside, refuse_if_locked
from trainlib.engine.checkpoint import Checkpoints

log = logging.getLogger(__name__)

IDENTITY = "identity.json"
"""Identity of a run: stage, recipe and data. A folder with this file holds a run."""


def acquire_run_folder(folder: Path, resume: str, identity: dict[str, Any]) -> Path | None:
    """Create and lock the run folder; return the step folder to resume from, if any.

    Raises UserError if another process is using the folder, if the run would overwrite its files,
    or if it cannot be created.
    """
    try:
        refuse_if_locked(folder)
        step_folder = resolve_resume(folder, resume, identity)
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
    except OSError as error:
        # If a parent of the path is a file, Python only reports that the file exists.
        file = next((path for path in (folder, *folder.parents) if path.is_file()), None)
        reason = f"{file} is a file" if file else error.strerror
        raise UserError(
            f"out_dir={folder} cannot be used ({reason}). Use another folder: out_dir=NEW."
        ) from error
    return step_folder


def resolve_resume(folder: Path, resume: str, identity: dict[str, Any]) -> Path | None:
    """Return the step folder to resume from, or None to start in an empty folder.

    Raises AlreadyFinished if the same run has finished in the folder, and UserError if the run
    would overwrite files in it.
    """
    if resume not in ("auto", "never"):
        return _named_step_folder(folder, Path(resume), identity["stage"])
    if not _occupied(folder):
        return None
    if not (folder / IDENTITY).is_file():
        # These could be anything, even datasets, so never move them.
        raise UserError(
            f"{folder} contains files that are not from a run. Use another folder: out_dir=NEW."
        )
    if resume == "never":
        try:
            log.info("moved the run in %s to %s", folder, move_aside(folder))
        except OSError as error:
            text = f"resume=never: {folder} cannot be moved ({error.strerror})"
            raise UserError(f"{text}. Use another folder: out_dir=NEW.") from error
        return None
    existing = read_identity(folder)
    final = {"init_from": "final"} if (folder / "final").is_dir() else {}
    stage = identity["stage"]
    if (other := existing.get("stage", stage)) != stage:
        text = f"{folder} holds a run of the {other} stage, but this is {stage}."
        raise UserError(f"{text} {_options(folder, final)}")
    differing = _differences(existing, json.loads(json.dumps(identity)))
    if final and not differing:
        text = "set resume=never or out_dir=NEW to train again"
        raise AlreadyFinished(f"already finished: {folder / 'final'} ({text})")
    newest = Checkpoints(folder, 1).newest()
    if differing:
        lines = "".join(f"\n  {text}" for text in differing.values())
        options = _options(folder, final or _uses(newest, set(differing)))
        state = "a finished" if final else "an unfinished"
        raise UserError(f"{folder} holds {state} run with another recipe:{lines}\n{options}")
    return newest


def read_identity(folder: Path) -> dict[str, Any]:
    """Return the identity of the run in a folder, in older runs without "stage"; empty if none."""
    path = folder / IDENTITY
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). Set resume=never or out_dir=NEW.") from error


def _named_step_folder(folder: Path, step_folder: Path, stage: str) -> Path:
    """Return the step folder set by resume=; raise UserError if this would overwrite files."""
    if not (step_folder / "train_state.json").is_file():
        raise UserError(f"resume={step_folder} is not a step folder (no train_state.json in it)")
    if (other := read_identity(step_folder.parent).get("stage", stage)) != stage:
        raise UserError(
            f"resume={step_folder} is from a run of the {other} stage, but this is {stage}. "
            f"Start a new run from its model with init_from={step_folder}."
        )
    inside = step_folder.resolve().parent == folder.resolve()
    if (folder / "final").is_dir() or not inside and _occupied(folder):
        raise UserError(
            f"{folder} already holds files, which resume={step_folder} would overwrite. "
            "Use another folder: out_dir=NEW."
        )
    return step_folder


def _occupied(folder: Path) -> bool:
    return folder.exists() and any(path.name != LOCK for path in folder.iterdir())


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, str]:
    old, new = saved["recipe"], current["recipe"]
    differing = {
        key: f"{key}: {old.get(key)!r} before, {new.get(key)!r} now"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    }
    if "base" in saved and saved["base"] != current["base"]:  # Older runs have none.
        differing["init_from"] = "the model in init_from has changed"
    if saved["data"] != current["data"]:
        differing["data"] = "the data files or the tokenizer have changed"
    return differing


def _uses(step_folder: Path | None, differing: set[str]) -> dict[str, str]:
    """Return the settings that can use a step folder despite these differences."""
    # A different model cannot use the weights; another optimizer cannot use the optimizer state.
    if step_folder is None or any(key.startswith(("model.", "tokenizer")) for key in differing):
        return {}
    keys = ("init_from",) if "optim.name" in differing else ("resume", "init_from")
    return dict.fromkeys(keys, step_folder.name)


def _options(folder: Path, uses: dict[str, str]) -> str:
    texts = {
        "resume": "resume from there with the current settings",
        "init_from": "start a new run from its model (with out_dir=NEW)",
    }
    options = {
        "out_dir=NEW": "train in another folder",
        "resume=never": f"move {folder} to {folder}.1 (or .2, ...) first",
        **{f"{key}={folder / name}": texts[key] for key, name in uses.items()},
    }
    width = max(map(len, options))
    return "Options:" + "".join(f"\n  {key:{width}}   {text}" for key, text in options.items())
