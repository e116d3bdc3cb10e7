"""Decide whether to start, resume or refuse a run, and never overwrite one."""

import json
import logging
from pathlib import Path
from typing import Any

from trainlib.core import files
from trainlib.core.errors import AlreadyFinished, UserError
from trainlib.core.files import (
    DAMAGED,
    LOCK,
    changed_files,
    is_temporary,
    move_aside,
    read_json,
    write_atomically,
    write_json,
)
from trainlib.engine.checkpoint import Checkpoints

log = logging.getLogger(__name__)

IDENTITY = "identity.json"  # Stage, recipe and data. A folder with this file holds a run.


def acquire_run_folder(folder: Path, resume: str, identity: dict[str, Any]) -> Path | None:
    """Create and lock the run folder, record the run; return the step folder to resume from."""
    try:
        files.refuse_if_locked(folder)
        started_from = "" if resume in ("auto", "never") else str(Path(resume).resolve())
        identity = {**identity, "resume": started_from}
        step_folder = resolve_resume(folder, resume, identity)
        folder.mkdir(parents=True, exist_ok=True)
        files.lock_folder(folder)
        for leftover in filter(is_temporary, folder.iterdir()):
            if leftover.is_file():  # The next checkpoint removes folders.
                leftover.unlink()
        if step_folder is not None and step_folder.parent.resolve() == folder.resolve():
            # The next checkpoint follows this one, even if the folder has later ones.
            write_atomically(folder / "latest", step_folder.name)
        write_json(folder / IDENTITY, identity)
    except OSError as error:
        # If a parent of the path is a file, Python only reports that the file exists.
        file = next((path for path in (folder, *folder.parents) if path.is_file()), None)
        text = f"out_dir={folder} cannot be used ({f'{file} is a file' if file else error.strerror}"
        raise UserError(f"{text}). Use another folder: out_dir=NEW.") from error
    return step_folder


def resolve_resume(folder: Path, resume: str, identity: dict[str, Any]) -> Path | None:
    """Return the step folder to resume from, or None to start in an empty folder.

    A run that was started with resume=FOLDER resumes from its newest step folder if the same
    command is typed again.
    """
    newest = Checkpoints(folder, 1).newest()
    copies = (read_identity(place) for place in (folder, newest) if place)
    existing = next((copy for copy in copies if {"recipe", "data"} <= copy.keys()), {})
    differing = _differences(existing, json.loads(json.dumps(identity))) if existing else {}
    again = newest and not differing and existing.get("resume") == identity["resume"]
    if resume == "auto":
        identity["resume"] = existing.get("resume", "")
    elif resume != "never" and not again:
        return _named_step_folder(folder, Path(resume), identity["stage"])
    if not _occupied(folder):
        return None
    if not existing and not (folder / IDENTITY).exists():
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
    final = {"init_from": "final"} if (folder / "final").is_dir() else {}
    options, stage = _options(folder, final or _uses(newest, set(differing))), identity["stage"]
    if not existing and (newest or final):
        raise UserError(f"{folder / IDENTITY} is damaged, and there is no copy. {options}")
    if not existing:
        log.warning("%s: the run had no checkpoint, so it starts again", folder)
        return None
    if (other := existing.get("stage", stage)) != stage:
        text = f"{folder} holds a run of the {other} stage, but this is {stage}."
        raise UserError(f"{text} {_options(folder, final)}")
    if differing:
        lines = "".join(f"\n  {text}" for text in differing.values())
        state = "a finished" if final else "an unfinished"
        raise UserError(f"{folder} holds {state} run with another recipe:{lines}\n{options}")
    if final and _final_is_intact(folder / "final", newest):
        text = "set resume=never or out_dir=NEW to train again"
        raise AlreadyFinished(f"already finished: {folder / 'final'} ({text})")
    return newest


def read_identity(folder: Path) -> dict[str, Any]:
    """Return the identity of the run in a folder; empty, with a warning, if it is damaged.

    Older runs have no stage, no base model and no digest.
    """
    path = folder / IDENTITY
    if not path.exists():
        return {}
    try:
        return {**read_json(path)}
    except DAMAGED as error:
        log.warning("%s is damaged: %s", path, error)
        return {}


def _final_is_intact(final: Path, newest: Path | None) -> bool:
    """Check the files of a finished run; move them aside if they changed and can be rebuilt."""
    changed = sorted(changed_files(final) - {"README.md"})
    if changed and newest is None:
        raise UserError(
            f"{final} has changed since it was written ({', '.join(changed)}), and no step folder "
            "is left to write it again from. Set resume=never or out_dir=NEW to train again."
        )
    if changed:
        log.warning("%s has changed since it was written (%s). It is moved to %s, and written again"
                    " from %s.", final, ", ".join(changed), move_aside(final), newest)  # fmt: skip
    return not changed


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
    """Return whether a folder has files, other than those of a process that was killed."""
    paths = folder.iterdir() if folder.exists() else ()
    return any(path.name != LOCK and not is_temporary(path) for path in paths)


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, str]:
    old, new = saved["recipe"], current["recipe"]
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    differing = {key: f"{key}: {old.get(key)!r} before, {new.get(key)!r} now" for key in keys}
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
    never = f"move {folder} to {folder}.1 (or .2, ...) first"
    options = {"out_dir=NEW": "train in another folder", "resume=never": never}
    options |= {f"{key}={folder / name}": texts[key] for key, name in uses.items()}
    width = max(map(len, options))
    return "Options:" + "".join(f"\n  {key:{width}}   {text}" for key, text in options.items())
