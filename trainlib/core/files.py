"""Atomic file writes, where readers see either the old file or the new one; digests and locks."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trainlib.core.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no fcntl; folders are not locked there.
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]  # Of the project.
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a damaged or missing JSON file and using its values can raise."""
SUMS, LOCK = "SHA256SUMS", ".lock"
HELD_LOCKS: list[int] = []  # File descriptors.


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; sync it and rename it to `path` on success."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        sync(temporary)
        if path.is_dir():
            log.warning("%s is a folder, so it is moved to %s", path, move_aside(path))
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


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object atomically, with a digest of itself."""
    write_atomically(path, json.dumps({**values, "digest": _digest_of_json(values)}))


def read_json(path: Path) -> dict[str, Any]:
    """Return what `write_json` wrote; raise one of DAMAGED for other content with a digest."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.pop("digest", None) not in (None, _digest_of_json(values)):
        raise ValueError(f"{path.name} has changed")
    return values


def _digest_of_json(values: dict[str, Any]) -> str:
    text = json.dumps(values, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def is_temporary(path: Path) -> bool:
    """Return whether a path is what a killed process left of a file or folder in the making."""
    return bool(re.match(r"\.(\d+\.|writing-)", path.name))


def write_sums(folder: Path) -> None:
    """Write the digests of the files in a folder to SHA256SUMS, as sha256sum does; 1.8 GB/s."""
    lines = [f"{digest_of(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")


def changed_files(folder: Path) -> set[str]:
    """Return the files in a folder that are not as write_sums found them."""
    if not (folder / SUMS).exists():
        log.info("%s has no %s (older runs have none), so its files are not checked", folder, SUMS)
        return set()
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError):
        sums = {}
    if "model.safetensors" not in sums:  # SHA256SUMS itself has changed.
        return {SUMS}
    paths = {folder / name: digest for name, digest in sums.items()}
    return {p.name for p, digest in paths.items() if not p.is_file() or digest_of(p) != digest}


def digest_of(path: Path, digest: Any = None) -> str:
    """Return the digest of a file, by default with SHA-256."""
    digest = digest or hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _fast_digest(path: Path) -> str:
    # Twice as fast as SHA-256 on a CPU without instructions for it.
    return digest_of(path, hashlib.blake2b(digest_size=16))


def record_files(folder: Path, names: Iterable[str]) -> dict[str, list[Any]]:
    """Return a record of each file by name: its size, modification time and digest."""
    paths = [folder / name for name in names]
    return {p.name: [p.stat().st_size, p.stat().st_mtime_ns, _fast_digest(p)] for p in paths}


def read_meta(path: Path, verify: bool = False) -> dict[str, Any]:
    """Return a meta.json; raise one of DAMAGED if a file differs from its record in "files".

    The size is always compared. The digest takes a second per GB, so it is compared only if the
    time has changed, or with `verify`. A changed time is recorded, so that the digests of a copied
    cache are compared once.
    """
    values = read_json(path)
    changed = False
    for name, record in values["files"].items():
        size, time, digest = record
        status = (path.parent / name).stat()
        if status.st_size != size:
            raise ValueError(f"{name} has {status.st_size:,} bytes instead of {size:,}")
        if verify or status.st_mtime_ns != time:
            if _fast_digest(path.parent / name) != digest:
                raise ValueError(f"{name} has changed")
            changed |= status.st_mtime_ns != time
            record[1] = status.st_mtime_ns
    if changed:
        with contextlib.suppress(OSError):  # A shared cache may be read-only.
            write_json(path, values)
    return values


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


def remove(path: Path) -> None:
    """Remove a file or folder, if it exists."""
    shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        path.unlink()


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
    text = f" The container sees only {Path.cwd()}. On the host, add this line to .env, run "
    text += f"`docker compose up -d train`, and use the path dataset/{target.name}:\n"
    return text + f"  DATASET_DIR={target.parent}"


def release_folders() -> None:
    """Unlock every folder that this process has locked."""
    while HELD_LOCKS:
        os.close(HELD_LOCKS.pop())


def lock_folder(folder: Path) -> None:
    """Lock a folder until exit or release_folders; raise UserError if another process has it."""
    if (descriptor := _lock(folder)) is not None:
        HELD_LOCKS.append(descriptor)
    else:
        log.warning("%s: this file system has no locks; let only one process train there", folder)


def refuse_if_locked(folder: Path) -> None:
    """Raise UserError if another process is training in a folder; write nothing."""
    if (folder / LOCK).exists() and (descriptor := _lock(folder)) is not None:
        os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """Return the descriptor of a folder's lock, or None if the file system has no locks."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            return None
        text = "another process is training in this folder. Wait for it, stop it (it saves a"
        raise UserError(f"{folder}: {text} checkpoint first), or set out_dir=NEW.") from None
    return descriptor


@contextlib.contextmanager
def build_lock(lock: Path) -> Iterator[str]:
    """Hold a lock file; yield a suffix for the name of the folder to build in.

    The system releases the lock when the process ends. Where locks are unsupported (Windows, some
    file systems), the suffix is the process id: each builds its own cache, and the last one wins.
    """
    locks: Any = fcntl  # None on Windows.
    while True:
        with lock.open("a") as file:
            try:
                try:
                    locks.flock(file, locks.LOCK_EX | locks.LOCK_NB)
                except BlockingIOError:
                    log.info("waiting for another process that is building %s", lock.name[1:-5])
                    locks.flock(file, locks.LOCK_EX)
            except (OSError, AttributeError):
                yield f"-{os.getpid()}"
                return
            # The previous holder removes the file. A lock on a removed file protects nothing.
            if lock.exists() and os.path.samefile(lock, file.fileno()):
                try:
                    yield ""
                finally:
                    lock.unlink(missing_ok=True)
                return
