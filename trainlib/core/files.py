"""Atomic file writes, where readers see either the old file or the new one, and folder locks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from trainlib.core.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no fcntl; folders are not locked there.
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parents[2]
"""Root folder of the project."""

LOCK = ".lock"
HELD_LOCKS: list[int] = []
"""File descriptors of the locks that this process holds."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; sync it and rename it to `path` on success.

    On failure, remove the temporary file and keep the old one. Both paths have the same suffix.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def download_problem(path: Path) -> str:
    """Return why a downloaded file is not what its name says, or an empty string."""
    with path.open("rb") as file:
        head = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"pk\x03\x04"):
        return "is a zip archive. Unpack it and use the files in it"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a git-lfs pointer, not the file itself. Run `git lfs pull` in its repository"
    if head.startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, possibly an error page. Download the file again"
    return "" if head else "is empty. Download or write the file again"


def write_atomically(path: Path, text: str) -> None:
    """Write a text file atomically; its folder must exist."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def refuse_to_overwrite(path: Path, mark: str = "") -> None:
    """Raise UserError if the folder of `path` is missing, or `path` is a file without `mark`.

    A tool's output files contain its mark near the start. An empty mark protects every file.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path}: no folder {path.parent}. Create it, or choose another file.")
    if path.is_dir():
        raise UserError(f"{path} is a folder. Choose a file in it.")
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(4096)
        if head and not (mark and mark.encode() in head):
            raise UserError(f"{path} already exists. Remove it, or choose another file.")


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk; raise OSError only for a file."""
    is_folder = path.is_dir()
    # Windows cannot open folders, and some network file systems cannot sync them.
    with contextlib.suppress(OSError) if is_folder else contextlib.nullcontext():
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def move_aside(folder: Path) -> Path:
    """Rename a folder to the first unused name of <folder>.1, .2, ...; return the new path."""
    number = 1
    while (aside := Path(f"{folder}.{number}")).exists():
        number += 1
    return folder.rename(aside)


def cache_dir() -> Path:
    """Return the folder for cached files, which can be rebuilt."""
    return Path(os.environ.get("TRAIN_LLM_CACHE_DIR", ".cache"))


def mount_hint(path: Path) -> str:
    """Return how to mount a host path if this process runs in a container, else an empty string."""
    target = Path(os.path.realpath(path))
    if "GPU_PROFILE" not in os.environ or target.exists() or target.is_relative_to(Path.cwd()):
        return ""
    return (
        f" The container sees only {Path.cwd()}. On the host, add this line to .env, run "
        f"`docker compose up -d train`, and use the path dataset/{target.name}:\n"
        f"  DATASET_DIR={target.parent}"
    )


def release_folders() -> None:
    """Unlock every folder that this process has locked."""
    while HELD_LOCKS:
        os.close(HELD_LOCKS.pop())


def lock_folder(folder: Path) -> None:
    """Lock a folder until exit or release_folders; raise UserError if another process has it."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise UserError(
                f"{folder}: another process is training in this folder. Wait for it, stop it (it"
                " saves a checkpoint first), or set out_dir=NEW."
            ) from None
    HELD_LOCKS.append(descriptor)


def refuse_if_locked(folder: Path) -> None:
    """Raise UserError if another process is training in a folder; write nothing."""
    if (folder / LOCK).exists():
        lock_folder(folder)
        os.close(HELD_LOCKS.pop())
