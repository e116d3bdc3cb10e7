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
build is resumed; a second process that needs the same cache waits for the first. meta.json records
the size, modification time and digest of each file; a damaged cache is rebuilt.
"""

import contextlib
import glob
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from tokenizer.bpe import Tokenizer
from trainlib.core import files
from trainlib.core.errors import UserError
from trainlib.core.files import DAMAGED, cache_dir, mount_hint, write_json
from trainlib.data import formats, tokenize_files
from trainlib.data.findings import Counts
from trainlib.data.tokenize_files import Task, Tokenized, delayed_interrupts

log = logging.getLogger(__name__)

LAYOUT = 7  # Increase this when the format of the cache files changes.
ARRAYS_LAYOUT = 5
"""Increase this too if the content of the arrays changes; unfinished runs then cannot resume."""
MAX_NAME_BYTES = 100
"""Limit for the data file's part in a folder's name; some file systems allow 143 bytes in all."""
MAX_SKIPPED = 0.01  # Share of a file's rows that data.on_error=skip may skip.
MAX_SOURCES = 4096
"""Maximum number of "source" values per file; rows with further values count as having none."""
SAVE_SECONDS = 5.0
OnError = Literal["stop", "skip"]
CONTENT = ("ids", "supervised", "offsets", "hashes")
"""The arrays that affect training; lines and sources only record where a row comes from."""
ARRAYS = {"offsets": np.int64, "lines": np.int64, "hashes": np.uint64, "sources": np.uint16}
FILES = ("ids.bin", "supervised.bin", "skipped.jsonl", *(f"{name}.bin" for name in ARRAYS))


@dataclass(frozen=True)
class TokenCache:
    """The tokens of one file, memory-mapped."""

    path: Path
    key: str  # Hash of the content, which does not depend on the file's path and time.
    ids: np.ndarray
    supervised: np.ndarray
    offsets: np.ndarray
    lines: np.ndarray
    hashes: np.ndarray
    sources: np.ndarray
    source_names: list[str]
    folder: Path = Path()
    num_skipped: int = 0  # Number of broken rows skipped by data.on_error=skip.
    counts: Counts = field(default_factory=Counts)
    first_broken: Sequence[Any] = ()  # Line and reason of the first skipped row.

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


def build_cache(path: Path, kind: str, tokenizer: Tokenizer,
                options: formats.ReadOptions | None = None, on_error: OnError = "stop",
                verify: bool = False) -> TokenCache:  # fmt: skip
    """Return the cache of one file; build it if it does not exist or is damaged.

    `verify` compares all digests. Raises UserError for a broken row (with on_error="skip", for more
    than MAX_SKIPPED of them), an unreadable file, or a disk without enough space. No partial cache
    is left behind, except for a chunk that no process survives.
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
    folder = cache_dir() / "tokens" / f"{_name(path)}-{key}"
    encoding = f"{tokenizer.fingerprint} {kind}"
    if (cache := _open_cache(folder, path, encoding, verify)) is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with files.build_lock(folder.with_name(f".{folder.name}.lock")) as suffix:
                # Another process may have built it.
                cache = _open_cache(folder, path, encoding, verify, logging.WARNING)
                if cache is None:
                    partial = folder.with_name(f".making-{folder.name}{suffix}")
                    found = formats.find_format(path, kind, options)
                    task = Task(path, kind, tokenizer, options)
                    _build(partial, folder, found, task, on_error)
                    cache = _open_cache(folder, path, encoding)
        except OSError as error:
            size = _estimate_bytes(path, tokenizer) / 1e6
            raise UserError(
                f"{folder}: {error.strerror or error}. The token cache of {path} needs about "
                f"{size:,.0f} MB. Set TRAIN_LLM_CACHE_DIR to another folder."
            ) from error
    if cache is None:
        raise UserError(f"{folder} cannot be read after it was written. Check the disk.")
    if verify:
        log.info("%s: the digests of its token cache are correct", path)
    if cache.num_skipped and on_error == "stop":
        raise formats.broken_row(path, *cache.first_broken)
    if cache.num_skipped:
        log.warning("%s: %s of %s rows are broken and were skipped; they are listed in %s", path,
                    f"{cache.num_skipped:,}", f"{cache.counts.rows + cache.num_skipped:,}",
                    cache.folder / "skipped.jsonl")  # fmt: skip
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

    Conversations and pairs longer than a row are not counted. Another tokenizer may have made it.
    """
    for meta in (cache_dir() / "tokens").glob(f"{glob.escape(_name(path))}-*/meta.json"):
        try:
            values = files.read_meta(meta)
        except DAMAGED:
            continue
        same = Path(values["path"]).resolve() == path.resolve() and values["kind"] == kind
        if same and meta.stat().st_mtime >= path.stat().st_mtime:
            per_record = 2 if kind == "dpo" else 1
            sizes = np.diff(np.fromfile(meta.with_name("offsets.bin"), ARRAYS["offsets"]))
            # The last token of each sequence is only a label.
            lengths = sizes.reshape(-1, per_record).sum(1) - per_record
            return int(lengths[(lengths <= row_length) | (kind == "pretrain")].sum())
    return 0


def _build(partial: Path, folder: Path, found: formats.Detection, task: Task,
           on_error: OnError) -> None:  # fmt: skip
    """Build the cache in `partial`, resuming an earlier build, and rename it to `folder`."""
    try:
        needed = _estimate_bytes(task.path, task.tokenizer, bool(found.source.compression))
        written = sum(file.stat().st_size for file in partial.glob("*"))
        free = shutil.disk_usage(folder.parent).free
        if free + written < needed:
            raise UserError(f"{folder.parent} has {free / 1e6:,.0f} MB free, but the token cache "
                            f"of {task.path} needs about {needed / 1e6:,.0f} MB. Free some space, "
                            "or set TRAIN_LLM_CACHE_DIR to a folder on another disk.")  # fmt: skip
        log.info("tokenizing %s, %s: %s", task.path, found.format.name, found.reason)
        with (delayed_interrupts() as interrupted,
              contextlib.closing(CacheWriter(partial, task, on_error)) as writer):  # fmt: skip
            writer.write_all(found, interrupted)
        files.remove(folder)
        partial.rename(folder)
        files.sync(folder.parent)
        (folder / "progress.json").unlink(missing_ok=True)
    except (UserError, OSError) as error:
        # After a kill, the same command continues where this one stopped.
        if not isinstance(error, tokenize_files.WorkerKilledError):
            shutil.rmtree(partial, ignore_errors=True)
        raise


@dataclass
class Progress:
    """State of a build, saved so that an interrupted build can be resumed."""

    sizes: dict[str, int]
    items: int = 0
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
        self.progress = _load_progress(partial)
        self.files = {name: (partial / name).open("ab") for name in FILES}
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

    def write_all(self, found: formats.Detection, interrupted: Sequence[int]) -> None:
        """Tokenize a file, then write meta.json."""
        progress, source = self.progress, found.source
        with tqdm(total=source.size, unit="B", unit_scale=True, leave=False, disable=None,
                  desc=f"tokenizing {self.task.path.name}") as bar:  # fmt: skip
            remaining = tokenize_files.read_chunks(source, progress.items, interrupted)
            for tokenized in tokenize_files.tokenize_chunks(remaining, self.task, source):
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
        meta = {"path": str(self.task.path), "kind": self.task.kind,
                "dtype": np.dtype(self.task.tokenizer.typecode).name, "format": found.format.name,
                "why": found.reason, **asdict(progress),
                "files": files.record_files(self.folder, FILES)}  # fmt: skip
        write_json(self.folder / "meta.json", meta)

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
        arrays = tokenized._asdict() | {"offsets": offsets, "sources": sources}
        for name in ("ids", "supervised", *ARRAYS):
            self.files[f"{name}.bin"].write(arrays[name].tobytes())
        progress.items += tokenized.num_items
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
        write_json(self.folder / "progress.json", asdict(self.progress))
        self._saved = time.monotonic()


def _load_progress(partial: Path) -> Progress:
    """Return the saved progress of a build; empty the folder if there is none or it is damaged."""
    try:
        saved = files.read_json(partial / "progress.json")
        for name, size in saved["sizes"].items():
            if not (file := partial / name).is_file() or file.stat().st_size < size:
                raise ValueError(f"{name} is shorter than recorded")
        return Progress(**{**saved, "counts": Counts(**saved["counts"])})
    except DAMAGED as error:
        if os.path.lexists(partial / "progress.json"):
            log.warning("%s is damaged (%s); tokenization starts again", partial, error)
    files.remove(partial)
    partial.mkdir()
    return Progress(dict.fromkeys(FILES, 0))


def _estimate_bytes(path: Path, tokenizer: Tokenizer, compressed: bool = False) -> int:
    """Estimate a cache's size, assuming three bytes of file per token and no per-row data."""
    tokens = path.stat().st_size * (4 if compressed else 1) / 3
    return round(tokens * (3 if tokenizer.vocab_size <= 1 << 16 else 5))


def _open_cache(folder: Path, path: Path, encoding: str, verify: bool = False,
                level: int = logging.DEBUG) -> TokenCache | None:  # fmt: skip
    """Return the cache in a folder; None if there is none or it is damaged, which is logged."""
    if not os.path.lexists(folder):
        return None
    try:
        meta = files.read_meta(folder / "meta.json", verify)
        types = {"ids": meta["dtype"], "supervised": np.uint8, **ARRAYS}
        arrays = {n: np.memmap(folder / f"{n}.bin", dtype, "r") for n, dtype in types.items()}
    except DAMAGED as error:
        log.log(level, "%s: its token cache %s is damaged and is rebuilt: %s", path, folder, error)
        return None
    content = " ".join(meta["files"][f"{name}.bin"][2] for name in CONTENT)
    key = hashlib.sha256(f"{ARRAYS_LAYOUT} {encoding} {content}".encode()).hexdigest()[:16]
    return TokenCache(path, key, source_names=meta["sources"], folder=folder,
                      num_skipped=meta["skipped"], counts=Counts(**meta["counts"]),
                      first_broken=meta["first_broken"][0] if meta["skipped"] else (),
                      **arrays)  # fmt: skip


def _name(path: Path) -> str:
    """Return the name of a data file without its suffix, short enough for a folder name."""
    return os.fsencode(path.stem)[:MAX_NAME_BYTES].decode("utf-8", "ignore")
