"""Tokenize each file once, into memory-mapped arrays on disk.

One cache a file, so that one more file costs one file. A cache is a folder under .cache/tokens/
(TRAIN_LLM_CACHE_DIR moves .cache), named by what it was made from: file, tokenizer, kind, options.

    ids.bin          the ids of all sequences, one after the other (16 bits where they fit, else 32)
    supervised.bin   one byte an id: is it under the loss
    offsets.bin      where sequence i begins, and the end of the last
    lines.bin        the line of each record        hashes.bin    64 bits of each record's content
    sources.bin      number of each record's kind   meta.json     names, counts, what it was made of
    skipped.jsonl    line and reason of each row that was left out (data.on_error=skip)

A record makes one sequence, a preference pair two: chosen, then rejected. A large file is read by
one process and tokenized by one a core, a chunk at a time (tokenize_files.py). The folder has
another name until it is complete; an interrupted build is resumed; a second process that needs the
same cache waits for the first.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from tokenizer.bpe import Tokenizer
from trainlib.core.errors import UserError
from trainlib.core.files import cache_dir, mount_hint, sync, write_atomically
from trainlib.data import formats
from trainlib.data.tokenize_files import Encode, Task, Tokenized, chunks, tokenize_chunks

log = logging.getLogger(__name__)

LAYOUT = 3  # Counts up when the folder's content changes its meaning.
MAX_SKIPPED = 0.01
"""Share of a file's rows that data.on_error=skip may leave out."""
MAX_SOURCES = 4096
"""Kinds of rows that are told apart; beyond it, "source" is something else than a kind."""
SAVE_SECONDS = 5.0
OnError = Literal["stop", "skip"]
CONTENT = ("ids", "supervised", "offsets", "hashes")
"""Arrays that decide what is learned; lines and sources only tell where a row is from."""
ARRAYS = {"offsets": np.int64, "lines": np.int64, "hashes": np.uint64, "sources": np.uint16}


@dataclass(frozen=True)
class TokenCache:
    """The tokens of one file, memory-mapped."""

    path: Path
    key: str
    """Names the content: the same for a file that was copied or touched, another for other ids."""
    ids: np.ndarray
    supervised: np.ndarray
    offsets: np.ndarray
    lines: np.ndarray
    hashes: np.ndarray
    sources: np.ndarray
    source_names: list[str]
    folder: Path = Path()
    num_skipped: int = 0
    """Broken rows that data.on_error=skip left out."""

    @property
    def num_records(self) -> int:
        """Rows of the file that are used."""
        return len(self.lines)

    @property
    def record_lengths(self) -> np.ndarray:
        """Ids of each record, of a pair those of both sequences."""
        return np.diff(self.offsets).reshape(self.num_records, -1).sum(1)

    def source(self, record: int) -> str:
        """The kind that a row names in its "source" field, empty without one."""
        return self.source_names[self.sources[record]]


def file_fingerprint(path: Path) -> str:
    """Sixteen hex digits of a file's size, time and three samples of 64 KiB."""
    status = path.stat()
    digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
    with path.open("rb") as file:
        for start in (0, status.st_size // 2, max(0, status.st_size - 65536)):
            file.seek(start)
            digest.update(file.read(65536))
    return digest.hexdigest()[:16]


def build_cache(
    path: Path,
    kind: str,
    tokenizer: Tokenizer,
    encode: Encode,
    options: formats.ReadOptions | None = None,
    on_error: OnError = "stop",
) -> TokenCache:
    """The cache of one file, made now unless it is there already.

    Raises UserError for a broken row (with on_error="skip": for more than MAX_SKIPPED of them), a
    file that cannot be read or a disk that is or would be full; nothing half-made is left then.
    """
    if not path.is_file():
        raise UserError(
            f"{path} does not exist (a data file of this run). Mend data.files.{mount_hint(path)}"
        )
    options = options or formats.ReadOptions()
    try:
        file = f"{path.resolve()} {file_fingerprint(path)}"
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    made_of = f"{LAYOUT} {file} {tokenizer.fingerprint} {kind} {options}"
    key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    folder = cache_dir() / "tokens" / f"{path.stem}-{key}"
    if not (folder / "meta.json").is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _alone(folder.with_name(f".{folder.name}.lock")) as shared_name:
                if not (folder / "meta.json").is_file():
                    making = folder.with_name(f".making-{folder.name}{shared_name}")
                    found = formats.find_format(path, kind, options)
                    task = Task(path, found.format.name, kind, tokenizer, encode, options)
                    _make(making, folder, found, task, on_error)
        except OSError as error:
            raise UserError(
                f"{folder}: {error.strerror or error}. The token cache of {path} needs about "
                f"{_size(path, tokenizer) / 1e6:,.0f} MB; TRAIN_LLM_CACHE_DIR moves it elsewhere."
            ) from error
    cache = _open(folder, path, f"{tokenizer.fingerprint} {kind}")
    if cache.num_skipped:
        _tell_skipped(cache, on_error)
    return cache


def counted_tokens(path: Path, kind: str, row_length: int) -> int:
    """Return the positions of a file by a cache that is newer than the file, or 0 without one.

    Conversations and pairs that are longer than a row do not count. The tokenizer is not known, so
    the cache may be another one's.
    """
    for meta in (cache_dir() / "tokens").glob(f"{glob.escape(path.stem)}-*/meta.json"):
        values = json.loads(meta.read_text(encoding="utf-8"))
        same = Path(values["path"]).resolve() == path.resolve() and values["kind"] == kind
        if same and meta.stat().st_mtime >= path.stat().st_mtime:
            per_record = 2 if kind == "dpo" else 1
            sizes = np.diff(np.fromfile(meta.with_name("offsets.bin"), ARRAYS["offsets"]))
            # The last token of each sequence is only a label.
            lengths = sizes.reshape(-1, per_record).sum(1) - per_record
            return int(lengths[(lengths <= row_length) | (kind == "pretrain")].sum())
    return 0


def _make(
    making: Path, folder: Path, found: formats.Detection, task: Task, on_error: OnError
) -> None:
    """Write the cache into `making`, or go on with what is there, and rename it to `folder`."""
    try:
        needed = _size(task.path, task.tokenizer, bool(found.source.compression))
        there = sum(file.stat().st_size for file in making.glob("*")) if making.is_dir() else 0
        free = shutil.disk_usage(folder.parent).free
        if free + there < needed:
            raise UserError(
                f"{folder.parent} has {free / 1e6:,.0f} MB free, but the token cache of "
                f"{task.path} needs about {needed / 1e6:,.0f} MB. Free some, or let "
                "TRAIN_LLM_CACHE_DIR name a folder on another disk."
            )
        log.info("tokenizing %s, %s: %s", task.path, found.format.name, found.why)
        with contextlib.closing(Writer(making, task, on_error)) as writer:
            writer.write_all(found)
        shutil.rmtree(folder, ignore_errors=True)
        making.rename(folder)
        sync(folder.parent)
    except (UserError, OSError):
        shutil.rmtree(making, ignore_errors=True)
        raise


@dataclass
class Progress:
    """How much of a file is written: enough to go on after a kill."""

    sizes: dict[str, int]
    chunks: int = 0
    rows: int = 0
    records: int = 0
    skipped: int = 0
    tokens: int = 0
    names: list[str] = field(default_factory=list)
    first_broken: list[Any] = field(default_factory=list)


class Writer:
    """Appends chunks to the files of a cache, and saves from time to time how far it is."""

    def __init__(self, making: Path, task: Task, on_error: OnError) -> None:
        self.making, self.task, self.on_error = making, task, on_error
        self.dtype = np.uint16 if task.tokenizer.vocab_size <= 1 << 16 else np.uint32
        making.mkdir(exist_ok=True)
        names = ["ids.bin", "supervised.bin", "skipped.jsonl", *(f"{name}.bin" for name in ARRAYS)]
        try:
            saved = json.loads((making / "progress.json").read_text(encoding="utf-8"))
            self.progress = Progress(**saved)
        except (OSError, ValueError, TypeError):
            self.progress = Progress(dict.fromkeys(names, 0))
        self.files = {name: (making / name).open("ab") for name in names}
        for name, file in self.files.items():
            file.truncate(self.progress.sizes[name])
            file.seek(0, os.SEEK_END)
        self._digests = {f"{name}.bin": _digest(making / f"{name}.bin") for name in CONTENT}
        if not self.progress.sizes["offsets.bin"]:
            self._append("offsets.bin", np.zeros(1, np.int64))
        self._names = {name: number for number, name in enumerate(self.progress.names)}
        self._saved = time.monotonic()

    def close(self) -> None:
        """Close the files; without meta.json they are no cache yet."""
        for file in self.files.values():
            file.close()

    def write_all(self, found: formats.Detection) -> None:
        """Tokenize a file and end with meta.json."""
        progress, source = self.progress, found.source
        with tqdm(total=source.size, unit="B", unit_scale=True, leave=False, disable=None,
                  desc=f"tokenizing {self.task.path.name}") as bar:  # fmt: skip
            todo = chunks(source, skip=progress.chunks)
            for done in tokenize_chunks(todo, self.task, source):
                self._write(done)
                bar.update(done.position - bar.n)
                if time.monotonic() - self._saved > SAVE_SECONDS:
                    self._save()
        if progress.skipped > MAX_SKIPPED * progress.rows:
            first = "; ".join(f"line {line}: {reason}" for line, reason in progress.first_broken)
            path = self.task.path
            raise UserError(
                f"{path}: {progress.skipped:,} of {progress.rows:,} rows are broken, more than the "
                f"{MAX_SKIPPED:.0%} that data.on_error=skip leaves out. The first: {first}. "
                f"All of them: python -m tools.inspect_data {path}"
            )
        assert progress.rows == progress.records + progress.skipped
        self._save()
        meta = {"path": str(self.task.path), "kind": self.task.kind,
                "dtype": np.dtype(self.dtype).name, "format": found.format.name, "why": found.why,
                "sources": progress.names, "tokens": progress.tokens, "rows": progress.rows,
                "records": progress.records, "skipped": progress.skipped,
                "content": " ".join(d.hexdigest() for d in self._digests.values())}  # fmt: skip
        (self.making / "progress.json").unlink()
        write_atomically(self.making / "meta.json", json.dumps(meta, ensure_ascii=False))

    def _write(self, done: Tokenized) -> None:
        progress = self.progress
        if done.broken and self.on_error == "stop":
            raise formats.broken_row(self.task.path, *done.broken[0])
        for line, reason in done.broken:
            row = {"path": str(self.task.path), "line": line, "reason": reason}
            text = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")
            self.files["skipped.jsonl"].write(text + b"\n")
        progress.first_broken += done.broken[: 5 - len(progress.first_broken)]
        numbers = [self._number(name) for name in done.source_names]
        sources = np.array(numbers, np.uint16)[done.sources]
        offsets = progress.tokens + np.cumsum(done.lengths)
        for name, values in (
            ("ids", done.ids.astype(self.dtype, copy=False)), ("supervised", done.supervised),
            ("offsets", offsets), ("lines", done.lines), ("hashes", done.hashes),
            ("sources", sources),
        ):  # fmt: skip
            self._append(f"{name}.bin", values)
        progress.chunks += 1
        progress.records += len(done.lines)
        progress.skipped += len(done.broken)
        progress.rows += len(done.lines) + len(done.broken)
        progress.tokens += len(done.ids)

    def _append(self, name: str, values: np.ndarray) -> None:
        data = values.tobytes()
        self.files[name].write(data)
        if name in self._digests:
            self._digests[name].update(data)

    def _number(self, name: str) -> int:
        if name not in self._names:
            if name and len(self._names) >= MAX_SOURCES:
                return self._number("")
            self._names[name] = len(self._names)
            self.progress.names.append(name)
        return self._names[name]

    def _save(self) -> None:
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            self.progress.sizes[name] = file.tell()
        write_atomically(self.making / "progress.json", json.dumps(asdict(self.progress)))
        self._saved = time.monotonic()


def _digest(path: Path) -> hashlib.blake2b:
    """Digest of what a file holds, to go on with; block by block, whatever its size."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest


def _size(path: Path, tokenizer: Tokenizer, compressed: bool = False) -> int:
    """Bytes that a cache takes, about: a token is about three bytes of file, a row is small."""
    tokens = path.stat().st_size * (4 if compressed else 1) / 3
    return round(tokens * (3 if tokenizer.vocab_size <= 1 << 16 else 5))


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[str]:
    """Hold a lock file; yields what to add to the name of a folder that must not be shared.

    A lock ends with its process, however that ends. Where the system or the file system knows no
    locks, each process makes a cache of its own, and the last one stays.
    """
    handle = _acquire(lock)
    if handle is None:
        yield f"-{os.getpid()}"
        return
    try:
        yield ""
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _acquire(lock: Path) -> int | None:
    """Wait for a lock file and return a descriptor that holds it, None where no lock works."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    while True:
        handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another process is making %s: waiting for it", lock.name[1:-5])
                fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            os.close(handle)
            return None
        # The process that held it before has removed the file: then this is no lock any more.
        if lock.exists() and os.stat(lock).st_ino == os.fstat(handle).st_ino:
            return handle
        os.close(handle)


def _tell_skipped(cache: TokenCache, on_error: OnError) -> None:
    listed = cache.folder / "skipped.jsonl"
    if on_error == "stop":
        with listed.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
        raise formats.broken_row(cache.path, first["line"], first["reason"])
    num_rows = f"{cache.num_records + cache.num_skipped:,}"
    log.warning("%s: %s of %s rows are broken and left out; they are listed in %s",
                cache.path, f"{cache.num_skipped:,}", num_rows, listed)  # fmt: skip


def _open(folder: Path, path: Path, encoding: str) -> TokenCache:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    arrays = {
        name: np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r")
        for name, dtype in {"ids": meta["dtype"], "supervised": np.uint8, **ARRAYS}.items()
    }
    key = hashlib.sha256(f"{LAYOUT} {encoding} {meta['content']}".encode()).hexdigest()[:16]
    return TokenCache(path, key, source_names=meta["sources"], folder=folder,
                      num_skipped=meta["skipped"], **arrays)  # fmt: skip
