"""Files that are either the old ones or the new ones, whole."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a text file beside its place, to the disk, then rename it into place."""
    beside = path.with_name(f".{path.name}.writing")
    with beside.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut where the system can do so."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError:  # some network file systems know no fsync of folders
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def move_aside(folder: Path) -> Path:
    """Rename a folder to the first free of <folder>.1, .2, ... and return its new place."""
    number = 1
    while (aside := Path(f"{folder}.{number}")).exists():
        number += 1
    return folder.rename(aside)


def cache_dir() -> Path:
    """Where everything that can be made again is kept."""
    return Path(os.environ.get("TRAIN_LLM_CACHE_DIR", ".cache"))
