"""Files that are either the old ones or the new ones, whole."""

from __future__ import annotations

import os
from pathlib import Path

from trainlib.core.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks, and goes without.
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parents[2]
"""The project's folder."""

LOCK = ".lock"
HELD: list[int] = []
"""Descriptors of the locks that this process holds."""


def write_atomically(path: Path, text: str) -> None:
    """Write a text file beside its place, to the disk, then rename it into place."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    with beside.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def refuse_to_overwrite(path: Path, mark: str = "") -> None:
    """Raise UserError where a file has no folder, or would replace one that lacks `mark`.

    A mark is what all files of a tool have among their first bytes; without one none is replaced.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}. Make it, or name another file.")
    if path.is_dir():
        raise UserError(f"{path} is a folder. Name a file in it.")
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(4096)
        if head and (not mark or mark.encode() not in head):
            raise UserError(f"{path} exists and would be lost. Remove it, or name another file.")


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


def mount_hint(path: Path) -> str:
    """Inside a container, how a place that only the host has is brought in; else nothing."""
    target = Path(os.path.realpath(path))
    if "GPU_PROFILE" not in os.environ or target.exists() or target.is_relative_to(Path.cwd()):
        return ""
    return (
        f" A container sees {Path.cwd()} alone. On the host put this line into .env, type "
        f"`docker compose up -d train`, and name it dataset/{target.name}:\n"
        f"  DATASET_DIR={target.parent}"
    )


def release_folders() -> None:
    """Give up every folder that this process holds."""
    while HELD:
        os.close(HELD.pop())


def lock_folder(folder: Path) -> None:
    """Claim a folder for this process, until release_folders or its end.

    Raises UserError where another process holds it.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise UserError(
                f"{folder}: another process is training there. Wait for it, stop it (it saves"
                " first), or train elsewhere with out_dir=NEW."
            ) from None
    HELD.append(descriptor)


def refuse_if_locked(folder: Path) -> None:
    """Raise UserError where another process trains in a folder; writes nothing."""
    if (folder / LOCK).exists():
        lock_folder(folder)
        os.close(HELD.pop())
