"""Token caches: each file is tokenized once, into memory-mapped arrays on disk.

A cache holds one file. It is a folder under .cache/tokens/ (TRAIN_LLM_CACHE_DIR replaces .cache);
its name contains a hash of file, tokenizer, kind and options.

    ids.bin         the ids of all sequences, concatenated (16 bits if they fit, else 32)
    supervised.bin  one byte per id: 1 if it is supervised
    offsets.bin     the start of each sequence, and the end of the last
    lines.bin       the line number of each record          hashes.bin  a 64-bit hash of its content
    sources.bin     the index of its "source" in meta.json  meta.json   names, counts, provenance
    skipped.jsonl   line and reason of each row skipped by data.on_error=skip

A record is one sequence; a preference pair is two, chosen and rejected. tokenize_files.py tokenizes
a large file on all cores. The folder has a temporary name until it is complete. An interrupted
build is resumed; a second process that needs the same cache waits for the first.
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
from trainlib.core.files import cache_dir, fcntl, mount_hint, sync, write_atomically
from trainlib.data import formats
from trainlib.data.findings import Counts
from trainlib.data.tokenize_files import Task, Tokenized, read_chunks, tokenize_chunks

log = logging.getLogger(__name__)

LAYOUT = 5
"""Increase this when the format of the cache files changes."""
MAX_SKIPPED = 0.01
"""Share of a file's rows that data.on_error=skip may skip."""
MAX_SOURCES = 4096
"""Maximum number of "source" values per file; rows with further values count as having none."""
SAVE_SECONDS = 5.0
OnError = Literal["stop", "skip"]
CONTENT = ("ids", "supervised", "offsets", "hashes")
"""The arrays that affect training; lines and sources only record where a row comes from."""
ARRAYS = {"offsets": np.int64, "lines": np.int64, "hashes": np.uint64, "sources": np.uint16}


@dataclass(frozen=True)
class TokenCache:
    """The tokens of one file, memory-mapped."""

    path: Path
    key: str
    """Hash of the content: depends on the ids, not on the path or modification time of the file."""
    ids: np.ndarray
    supervised: np.ndarray
    offsets: np.ndarray
    lines: np.ndarray
    hashes: np.ndarray
    sources: np.ndarray
    source_names: list[str]
    folder: Path = Path()
    num_skipped: int = 0
    """Number of broken rows skipped by data.on_error=skip."""
    counts: Counts = field(default_factory=Counts)

    @property
    def num_records(self) -> int:
        """Return the number of rows that were not skipped."""
        return len(self.lines)

    @property
    def record_lengths(self) -> np.ndarray:
        """Return the number of ids in each record; for a pair, in both sequences together."""
        return np.diff(self.offsets).reshape(self.num_records, -1).sum(1)

    def source(self, record: int) -> str:
        """Return the "source" of a row, or an empty string if it has none."""
        return self.source_names[self.sources[record]]


def file_fingerprint(path: Path) -> str:
    """Return a 16-digit hex hash of a file's size, mtime and three 64 KiB samples."""
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
    options: formats.ReadOptions | None = None,
    on_error: OnError = "stop",
) -> TokenCache:
    """Return the cache of one file; build it if it does not exist.

    Raises UserError for a broken row (with on_error="skip", for more than MAX_SKIPPED of them), an
    unreadable file, or a disk without enough space. No partial cache is left behind.
    """
    if not path.is_file():
        raise UserError(f"data file {path} does not exist. Fix data.files.{mount_hint(path)}")
    options = options or formats.ReadOptions()
    try:
        file = f"{path.resolve()} {file_fingerprint(path)}"
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    provenance = f"{LAYOUT} {file} {tokenizer.fingerprint} {kind} {options}"
    key = hashlib.sha256(provenance.encode()).hexdigest()[:16]
    folder = cache_dir() / "tokens" / f"{path.stem}-{key}"
    if not (folder / "meta.json").is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _build_lock(folder.with_name(f".{folder.name}.lock")) as suffix:
                if not (folder / "meta.json").is_file():
                    partial = folder.with_name(f".making-{folder.name}{suffix}")
                    found = formats.find_format(path, kind, options)
                    task = Task(path, kind, tokenizer, options)
                    _build(partial, folder, found, task, on_error)
        except OSError as error:
            size = _estimate_bytes(path, tokenizer) / 1e6
            raise UserError(
                f"{folder}: {error.strerror or error}. The token cache of {path} needs about "
                f"{size:,.0f} MB. Set TRAIN_LLM_CACHE_DIR to another folder."
            ) from error
    cache = _open_cache(folder, path, f"{tokenizer.fingerprint} {kind}")
    if cache.num_skipped:
        _report_skipped(cache, on_error)
    for line in cache.counts.log_lines():
        log.info("%s: %s", path, line)
    for finding in cache.counts.findings():
        lines = ", ".join(map(str, finding["lines"][:5]))
        log.warning("%s: %s in %s rows (%.0f %%; lines %s). %s", path, finding["name"],
                    f"{finding['count']:,}", 100 * finding["share"], lines,
                    finding["fix"])  # fmt: skip
    return cache


def counted_tokens(path: Path, kind: str, row_length: int) -> int:
    """Return the number of positions in a file from a cache newer than it, or 0 if none exists.

    Conversations and pairs longer than a row are not counted. The cache may come from another
    tokenizer.
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


def _build(
    partial: Path, folder: Path, found: formats.Detection, task: Task, on_error: OnError
) -> None:
    """Build the cache in `partial`, resuming an earlier build, and rename it to `folder`."""
    try:
        needed = _estimate_bytes(task.path, task.tokenizer, bool(found.source.compression))
        written = sum(file.stat().st_size for file in partial.glob("*"))
        free = shutil.disk_usage(folder.parent).free
        if free + written < needed:
            raise UserError(
                f"{folder.parent} has {free / 1e6:,.0f} MB free, but the token cache of "
                f"{task.path} needs about {needed / 1e6:,.0f} MB. Free some space, or "
                "set TRAIN_LLM_CACHE_DIR to a folder on another disk."
            )
        log.info("tokenizing %s, %s: %s", task.path, found.format.name, found.reason)
        with contextlib.closing(CacheWriter(partial, task, on_error)) as writer:
            writer.write_all(found)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync(folder.parent)
    except (UserError, OSError):
        shutil.rmtree(partial, ignore_errors=True)
        raise


@dataclass
class Progress:
    """State of a build, saved so that an interrupted build can be resumed."""

    sizes: dict[str, int]
    chunks: int = 0
    records: int = 0
    skipped: int = 0
    tokens: int = 0
    sources: list[str] = field(default_factory=list)
    first_broken: list[Any] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)


class CacheWriter:
    """Appends tokenized chunks to the files of a cache and saves its progress regularly."""

    def __init__(self, partial: Path, task: Task, on_error: OnError) -> None:
        self.folder, self.task, self.on_error = partial, task, on_error
        self.dtype = np.uint16 if task.tokenizer.vocab_size <= 1 << 16 else np.uint32
        partial.mkdir(exist_ok=True)
        names = ["ids.bin", "supervised.bin", "skipped.jsonl", *(f"{name}.bin" for name in ARRAYS)]
        try:
            saved = json.loads((partial / "progress.json").read_text(encoding="utf-8"))
            self.progress = Progress(**{**saved, "counts": Counts(**saved["counts"])})
        except (OSError, ValueError, TypeError, KeyError):
            self.progress = Progress(dict.fromkeys(names, 0))
        self.files = {name: (partial / name).open("ab") for name in names}
        for name, file in self.files.items():
            file.truncate(self.progress.sizes[name])
            file.seek(0, os.SEEK_END)
        if not self.progress.sizes["offsets.bin"]:
            self.files["offsets.bin"].write(np.zeros(1, np.int64).tobytes())
        self._source_ids = {name: number for number, name in enumerate(self.progress.sources)}
        self._saved = time.monotonic()

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()

    def write_all(self, found: formats.Detection) -> None:
        """Tokenize a file, then write meta.json."""
        progress, source = self.progress, found.source
        with tqdm(total=source.size, unit="B", unit_scale=True, leave=False, disable=None,
                  desc=f"tokenizing {self.task.path.name}") as bar:  # fmt: skip
            remaining = read_chunks(source, skip=progress.chunks)
            for tokenized in tokenize_chunks(remaining, self.task, source):
                self._write(tokenized)
                bar.update(tokenized.position - bar.n)
                if time.monotonic() - self._saved > SAVE_SECONDS:
                    self._save()
        num_rows = progress.counts.rows + progress.skipped
        if progress.skipped > MAX_SKIPPED * num_rows:
            first = "; ".join(f"line {line}: {reason}" for line, reason in progress.first_broken)
            path = self.task.path
            raise UserError(
                f"{path}: {progress.skipped:,} of {num_rows:,} rows are broken, more than the "
                f"{MAX_SKIPPED:.0%} that data.on_error=skip allows. The first: {first}. "
                f"Run python -m tools.inspect_data {path} to list them all."
            )
        if not progress.records:
            reasons = ", ".join(progress.counts.not_used)
            raise UserError(f"{self.task.path}: no row can be used for {self.task.kind}: {reasons}")
        self._save()
        content = (np.memmap(self.folder / f"{name}.bin", mode="r").data for name in CONTENT)
        meta = {"path": str(self.task.path), "kind": self.task.kind,
                "dtype": np.dtype(self.dtype).name, "format": found.format.name,
                "why": found.reason, **asdict(progress),
                "content": " ".join(hashlib.blake2b(data, digest_size=16).hexdigest()
                                    for data in content)}  # fmt: skip
        (self.folder / "progress.json").unlink()
        write_atomically(self.folder / "meta.json", json.dumps(meta))

    def _write(self, tokenized: Tokenized) -> None:
        progress = self.progress
        if tokenized.broken and self.on_error == "stop":
            raise formats.broken_row(self.task.path, *tokenized.broken[0])
        for line, reason in tokenized.broken:
            row = {"path": str(self.task.path), "line": line, "reason": reason}
            text = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")
            self.files["skipped.jsonl"].write(text + b"\n")
        progress.first_broken += tokenized.broken[: 5 - len(progress.first_broken)]
        numbers = [self._source_id(name) for name in tokenized.source_names]
        sources = np.array(numbers, np.uint16)[tokenized.sources]
        offsets = progress.tokens + np.cumsum(tokenized.lengths)
        for name, values in (
            ("ids", tokenized.ids.astype(self.dtype, copy=False)),
            ("supervised", tokenized.supervised), ("offsets", offsets), ("sources", sources),
            ("lines", tokenized.lines), ("hashes", tokenized.hashes),
        ):  # fmt: skip
            self.files[f"{name}.bin"].write(values.tobytes())
        progress.chunks += 1
        progress.records += len(tokenized.lines)
        progress.skipped += len(tokenized.broken)
        progress.counts.merge(tokenized.counts)
        progress.tokens += len(tokenized.ids)

    def _source_id(self, name: str) -> int:
        if name not in self._source_ids:
            if name and len(self._source_ids) >= MAX_SOURCES:
                return self._source_id("")
            self._source_ids[name] = len(self._source_ids)
            self.progress.sources.append(name)
        return self._source_ids[name]

    def _save(self) -> None:
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            self.progress.sizes[name] = file.tell()
        write_atomically(self.folder / "progress.json", json.dumps(asdict(self.progress)))
        self._saved = time.monotonic()


def _estimate_bytes(path: Path, tokenizer: Tokenizer, compressed: bool = False) -> int:
    """Estimate a cache's size, assuming three bytes of file per token and no per-row data."""
    tokens = path.stat().st_size * (4 if compressed else 1) / 3
    return round(tokens * (3 if tokenizer.vocab_size <= 1 << 16 else 5))


@contextlib.contextmanager
def _build_lock(lock: Path) -> Iterator[str]:
    """Hold a lock file; yield a suffix for the name of the folder to build in.

    The system releases the lock when the process ends. Where locks are unsupported (Windows, some
    file systems), the suffix is the process id: each builds its own cache, and the last one wins.
    """
    while True:
        with lock.open("a") as file:
            try:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    log.info("waiting for another process that is building %s", lock.name[1:-5])
                    fcntl.flock(file, fcntl.LOCK_EX)
            except (OSError, AttributeError):  # On Windows, fcntl is None.
                yield f"-{os.getpid()}"
                return
            # The previous holder removes the file. A lock on a removed file protects nothing.
            if lock.exists() and os.path.samefile(lock, file.fileno()):
                try:
                    yield ""
                finally:
                    lock.unlink(missing_ok=True)
                return


def _report_skipped(cache: TokenCache, on_error: OnError) -> None:
    """Log the number of skipped rows, or raise UserError for the first if on_error="stop"."""
    listed = cache.folder / "skipped.jsonl"
    if on_error == "stop":
        with listed.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
        raise formats.broken_row(cache.path, first["line"], first["reason"])
    num_rows = f"{cache.counts.rows + cache.num_skipped:,}"
    log.warning("%s: %s of %s rows are broken and were skipped; they are listed in %s",
                cache.path, f"{cache.num_skipped:,}", num_rows, listed)  # fmt: skip


def _open_cache(folder: Path, path: Path, encoding: str) -> TokenCache:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    arrays = {
        name: np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r")
        for name, dtype in {"ids": meta["dtype"], "supervised": np.uint8, **ARRAYS}.items()
    }
    key = hashlib.sha256(f"{LAYOUT} {encoding} {meta['content']}".encode()).hexdigest()[:16]
    return TokenCache(path, key, source_names=meta["sources"], folder=folder,
                      num_skipped=meta["skipped"], counts=Counts(**meta["counts"]),
                      **arrays)  # fmt: skip
