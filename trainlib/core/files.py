"""Atomic file writes: readers see the old file or the new one, never a part. Locks of folders."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from trainlib.core.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks; there, folders are not locked.
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parents[2]
"""The project's folder."""

LOCK = ".lock"
HELD_LOCKS: list[int] = []
"""Descriptors of the locks that this process holds."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; sync it and rename it to `path` on success.

    On failure the temporary file is removed and the old file stays. The suffix is that of `path`.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file; its folder must exist."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def refuse_to_overwrite(path: Path, mark: str = "") -> None:
    """Raise UserError if a file has no folder, or would replace one without `mark` in its head.

    All files that a tool writes contain its mark; without a mark no file is replaced.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}. Make it, or name another file.")
    if path.is_dir():
        raise UserError(f"{path} is a folder. Name a file in it.")
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(4096)
        if head and not (mark and mark.encode() in head):
            raise UserError(f"{path} exists and would be lost. Remove it, or name another file.")


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut; raises OSError for a file."""
    is_folder = path.is_dir()
    # Windows opens no folders, and some network file systems cannot sync them.
    with contextlib.suppress(OSError) if is_folder else contextlib.nullcontext():
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def move_aside(folder: Path) -> Path:
    """Rename a folder to the first free of <folder>.1, .2, ... and return its new path."""
    number = 1
    while (aside := Path(f"{folder}.{number}")).exists():
        number += 1
    return folder.rename(aside)


def cache_dir() -> Path:
    """Return the folder of all files that can be rebuilt."""
    return Path(os.environ.get("TRAIN_LLM_CACHE_DIR", ".cache"))


def mount_hint(path: Path) -> str:
    """Return how to mount a path of the host, if this runs in a container; else an empty text."""
    target = Path(os.path.realpath(path))
    if "GPU_PROFILE" not in os.environ or target.exists() or target.is_relative_to(Path.cwd()):
        return ""
    return (
        f" A container sees {Path.cwd()} alone. On the host put this line into .env, type "
        f"`docker compose up -d train`, and name it dataset/{target.name}:\n"
        f"  DATASET_DIR={target.parent}"
    )


def release_folders() -> None:
    """Unlock every folder that this process has locked."""
    while HELD_LOCKS:
        os.close(HELD_LOCKS.pop())


def lock_folder(folder: Path) -> None:
    """Lock a folder for this process, until release_folders or its end.

    Raises UserError if another process has locked it.
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
    HELD_LOCKS.append(descriptor)


def refuse_if_locked(folder: Path) -> None:
    """Raise UserError if another process trains in a folder; writes nothing."""
    if (folder / LOCK).exists():
        lock_folder(folder)
        os.close(HELD_LOCKS.pop())
