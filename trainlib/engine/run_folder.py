"""The folder of a run: whose it is, whether to go on there, and that nothing in it is lost."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from trainlib.core.errors import UserError
from trainlib.core.files import LOCK, lock_folder, move_aside, refuse_if_locked
from trainlib.engine.checkpoint import Checkpoints

log = logging.getLogger(__name__)

IDENTITY = "identity.json"
"""What a run is, by its recipe and its data; a folder with this file holds a run."""


def take_folder(folder: Path, resume: str, identity: dict[str, Any]) -> Path | None:
    """Claim a run's folder, make it and lock it; returns the step folder to go on from.

    Raises UserError where it is another's, holds what a run would overwrite or cannot be made.
    """
    try:
        refuse_if_locked(folder)
        step_folder = claim(folder, resume, identity)
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
    except OSError as error:
        # Of a path through a file, Python says that the file exists.
        file = next((path for path in (folder, *folder.parents) if path.is_file()), None)
        reason = f"{file} is a file" if file else error.strerror
        raise UserError(
            f"out_dir={folder} cannot be used ({reason}); give another folder by out_dir=NEW"
        ) from error
    return step_folder


def claim(folder: Path, resume: str, identity: dict[str, Any]) -> Path | None:
    """The step folder to go on from, or None for a fresh start in a free folder.

    Raises UserError where the folder holds what a run would overwrite.
    """
    if resume not in ("auto", "never"):
        return _named(folder, Path(resume))
    if not _occupied(folder):
        return None
    if not (folder / IDENTITY).is_file():
        # It may be anything, data too: it is not for this program to move.
        cure = "give another folder by out_dir=NEW"
        raise UserError(f"{folder} holds files, but no run of this program: {cure}")
    if resume == "never":
        log.info("moved the run that was in %s to %s", folder, _moved(folder))
        return None
    if (folder / "final").is_dir():
        raise UserError(f"{folder} holds a finished run. {_ways(folder, {'init_from': 'final'})}")
    newest = Checkpoints(folder, 1).newest()
    was = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    if differing := _differing(was, json.loads(json.dumps(identity))):
        lines = "".join(f"\n  {text}" for text in differing.values())
        ways = _ways(folder, _uses(newest, set(differing)))
        raise UserError(f"{folder} holds an unfinished run of another recipe:{lines}\n{ways}")
    return newest


def _named(folder: Path, step_folder: Path) -> Path:
    """A step folder that resume= names, where going on from it overwrites nothing."""
    if not (step_folder / "train_state.json").is_file():
        raise UserError(f"resume={step_folder} is no step folder (it has no train_state.json)")
    inside = step_folder.resolve().parent == folder.resolve()
    if (folder / "final").is_dir() or not inside and _occupied(folder):
        raise UserError(
            f"{folder} holds files already, which resume={step_folder} would overwrite; "
            "give another folder by out_dir=NEW"
        )
    return step_folder


def _occupied(folder: Path) -> bool:
    """Whether a folder holds more than a lock."""
    return folder.exists() and any(path.name != LOCK for path in folder.iterdir())


def _moved(folder: Path) -> Path:
    """Where a run was moved to; raises UserError where the system does not let go of its folder."""
    try:
        return move_aside(folder)
    except OSError as error:
        raise UserError(
            f"resume=never: {folder} cannot be moved ({error.strerror}); "
            "give another folder by out_dir=NEW"
        ) from error


def _differing(was: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """What two runs do not share, key to words."""
    before, after = was["recipe"], now["recipe"]
    differing = {
        key: f"{key}: {before.get(key)!r} there, {after.get(key)!r} now"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    }
    if was["data"] != now["data"]:
        differing["data"] = "the data files or the tokenizer have changed"
    return differing


def _uses(step_folder: Path | None, differing: set[str]) -> dict[str, str]:
    """What a step folder is good for under other settings: key to the folder's name."""
    # Another model has no use for its weights, another optimizer none for its state.
    if step_folder is None or any(key.startswith(("model.", "tokenizer")) for key in differing):
        return {}
    keys = ("init_from",) if "optim.name" in differing else ("resume", "init_from")
    return dict.fromkeys(keys, step_folder.name)


def _ways(folder: Path, uses: dict[str, str]) -> str:
    """What can be done about a folder that holds a run, a line each."""
    ways = {
        "out_dir=NEW": "train into another folder",
        "resume=never": f"move {folder} to {folder}.1 (or .2, ...) first",
    }
    what = {
        "resume": "go on from there with the settings of now",
        "init_from": "start a new run from its model (with out_dir=NEW)",
    }
    ways |= {f"{key}={folder / name}": what[key] for key, name in uses.items()}
    width = max(map(len, ways))
    return "Ways on:" + "".join(f"\n  {way:{width}}   {does}" for way, does in ways.items())
