"""Tokenize each file once, into memory-mapped arrays on disk.

One cache a file, so that one more file costs one file. A cache is a folder under .cache/tokens/
(TRAIN_LLM_CACHE_DIR moves .cache), named by what it was made from: file, tokenizer, kind.

    ids.bin          the ids of all sequences, one after the other (16 bits where they fit, else 32)
    supervised.bin   one byte an id: is it under the loss
    offsets.npy      where sequence i begins, and the end of the last
    lines.npy        the line of each record        hashes.npy    64 bits of each record's content
    sources.npy      number of each record's kind   meta.json     names, counts, what it was made of

A record makes one sequence, a preference pair two: chosen, then rejected.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

import formats
from tokenizer import Sequence, Tokenizer
from trainlib.errors import UserError
from trainlib.files import cache_dir

log = logging.getLogger(__name__)

LAYOUT = 1  # Counts up when the folder's content changes its meaning.
Encode = Callable[[Tokenizer, formats.Record], list[Sequence]]


@dataclass(frozen=True)
class TokenCache:
    """The tokens of one file, memory-mapped."""

    path: Path
    key: str
    ids: np.ndarray
    supervised: np.ndarray
    offsets: np.ndarray
    lines: np.ndarray
    hashes: np.ndarray
    sources: np.ndarray
    source_names: list[str]

    @property
    def num_records(self) -> int:
        """Rows of the file."""
        return len(self.lines)

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
) -> TokenCache:
    """The cache of one file, made now unless it is there already.

    Raises UserError for a bad row, a file that cannot be read or a full disk; nothing half-made
    is left behind.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist (a data file of this run). Mend data.files.")
    options = options or formats.ReadOptions()
    file = f"{path.resolve()} {file_fingerprint(path)}"
    made_of = f"{LAYOUT} {file} {tokenizer.fingerprint} {kind} {options}"
    key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    folder = cache_dir() / "tokens" / f"{path.stem}-{key}"
    if not (folder / "meta.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as making:
            try:
                _write(Path(making), path, kind, tokenizer, encode, options)
            except OSError as error:
                raise UserError(
                    f"{folder}: {error.strerror or error}. The token cache of {path} needs about "
                    f"{path.stat().st_size / 1e6:.0f} MB; TRAIN_LLM_CACHE_DIR moves it elsewhere."
                ) from error
            shutil.rmtree(folder, ignore_errors=True)
            try:
                os.rename(making, folder)
            except OSError:
                # Another process has just put the same content there.
                if not (folder / "meta.json").is_file():
                    raise
            else:
                os.mkdir(making)  # TemporaryDirectory wants something to remove.
    return _open(folder, path, key)


def _write(
    folder: Path,
    path: Path,
    kind: str,
    tokenizer: Tokenizer,
    encode: Encode,
    options: formats.ReadOptions,
) -> None:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    offsets, lines, hashes, sources = [0], [], [], []
    source_names: dict[str, int] = {}
    with (
        (folder / "ids.bin").open("wb") as ids_file,
        (folder / "supervised.bin").open("wb") as mask_file,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=f"tokenizing {path.name}",
             leave=False, disable=None) as bar,
    ):  # fmt: skip
        for record in formats.read_records(path, kind, options):
            for sequence in encode(tokenizer, record):
                offsets.append(offsets[-1] + len(sequence.ids))
                _append(ids_file, sequence.ids, dtype)
                _append(mask_file, sequence.mask, np.uint8)
            lines.append(record.line)
            hashes.append(_content_hash(record))
            sources.append(source_names.setdefault(record.source, len(source_names)))
            bar.update(_rough_bytes(record))
    np.save(folder / "offsets.npy", np.asarray(offsets, np.int64))
    np.save(folder / "lines.npy", np.asarray(lines, np.int64))
    np.save(folder / "hashes.npy", np.asarray(hashes, np.uint64))
    np.save(folder / "sources.npy", np.asarray(sources, np.uint16))
    meta = {"path": str(path), "kind": kind, "dtype": np.dtype(dtype).name,
            "sources": list(source_names), "tokens": offsets[-1]}  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")


def _append(file: BinaryIO, values: list[int] | list[bool], dtype: Any) -> None:
    file.write(np.asarray(values, dtype).tobytes())


def _content_hash(record: formats.Record) -> int:
    """64 bits of what a record is about: of a preference pair the prompt, else all of it."""
    about = record.value[0][:-1] if isinstance(record.value, tuple) else record.value
    text = about if isinstance(about, str) else json.dumps(about, ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _rough_bytes(record: formats.Record) -> int:
    """Size of a record on disk, near enough for a progress bar."""
    if isinstance(record.value, str):
        return len(record.value.encode()) + 12
    conversations = record.value if isinstance(record.value, tuple) else (record.value,)
    return sum(len(m["content"].encode()) + 40 for c in conversations for m in c)


def _open(folder: Path, path: Path, key: str) -> TokenCache:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))

    def array(name: str) -> np.ndarray:
        return np.load(folder / name, mmap_mode="r")

    return TokenCache(
        path,
        key,
        np.memmap(folder / "ids.bin", dtype=meta["dtype"], mode="r"),
        np.memmap(folder / "supervised.bin", dtype=np.uint8, mode="r"),
        array("offsets.npy"),
        array("lines.npy"),
        array("hashes.npy"),
        array("sources.npy"),
        meta["sources"],
    )
