"""Chunks of rows to ids, in one process for a small file, in one a core for a large one.

chunks            items of a file, about a megabyte at a time
tokenize_chunk    a chunk -> ids, loss mask, lines, hashes; what is broken is listed
tokenize_chunks   all chunks in order, a few at a time in other processes
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenizer.bpe import Sequence, Tokenizer
from trainlib.core.errors import UserError
from trainlib.data import formats
from trainlib.data.containers import Item
from trainlib.data.readers import Source

CHUNK_BYTES = 1 << 20
PARSED_BYTES = 1000
"""What a row that is parsed already counts for."""
SMALL_FILE_BYTES = 8 << 20
"""Below it, starting processes costs more than they save."""
Encode = Callable[[Tokenizer, formats.Record], list[Sequence]]


class Chunk(NamedTuple):
    """Neighbouring items, and how much of the file is read with them."""

    items: list[Item]
    position: int


@dataclass(frozen=True)
class Task:
    """All that is needed to tokenize a chunk of a file."""

    path: Path
    format_name: str
    kind: str
    tokenizer: Tokenizer
    encode: Encode
    options: formats.ReadOptions


class Tokenized(NamedTuple):
    """A chunk as arrays: by id, by sequence (lengths), by record (the rest)."""

    ids: np.ndarray
    supervised: np.ndarray
    lengths: np.ndarray
    lines: np.ndarray
    hashes: np.ndarray
    sources: np.ndarray
    source_names: list[str]
    broken: list[tuple[int, str]]
    position: int


def chunks(source: Source, skip: int = 0) -> Iterator[Chunk]:
    """The items of a file in chunks that are the same each time; the first `skip` left out."""
    items: list[Item] = []
    size = 0
    for item in source.items():
        items.append(item)
        size += len(item.content) if isinstance(item.content, (bytes, str)) else PARSED_BYTES
        if size >= CHUNK_BYTES:
            if skip:
                skip -= 1
            else:
                yield Chunk(items, source.position)
            items, size = [], 0
    if items and not skip:
        yield Chunk(items, source.position)


def tokenize_chunk(chunk: Chunk, task: Task) -> Tokenized:
    """Ids and loss mask of a chunk's records, and what its broken rows are."""
    # Filled from lists several times as fast as NumPy's arrays are.
    ids, mask = array("I"), bytearray()
    lengths, lines, hashes, sources = [], [], [], []
    names: dict[str, int] = {}
    broken: list[tuple[int, str]] = []
    format_ = next(f for f in formats.FORMATS if f.name == task.format_name)
    for line, record in formats.check_items(chunk.items, task.path, format_, task.options):
        if isinstance(record, formats.Broken):
            broken.append((line, record.reason))
            continue
        for sequence in task.encode(task.tokenizer, record):
            ids.fromlist(sequence.ids)
            mask += bytes(sequence.mask)
            lengths.append(len(sequence.ids))
        lines.append(line)
        hashes.append(_content_hash(record))
        sources.append(names.setdefault(record.source, len(names)))
    return Tokenized(
        np.frombuffer(ids, np.uint32), np.frombuffer(mask, np.uint8), np.array(lengths, np.int64),
        np.array(lines, np.int64), np.array(hashes, np.uint64), np.array(sources, np.int64),
        list(names), broken, chunk.position,
    )  # fmt: skip


def tokenize_chunks(todo: Iterator[Chunk], task: Task, source: Source) -> Iterator[Tokenized]:
    """Every chunk in order; of a large file in as many processes as there are cores."""
    cores = number_of_cores()
    small = source.size < (SMALL_FILE_BYTES // 4 if source.compression else SMALL_FILE_BYTES)
    if small or cores == 1:
        yield from (tokenize_chunk(chunk, task) for chunk in todo)
        return
    # A fork shares what is loaded; elsewhere than on Linux it is not safe with threads.
    method = "fork" if sys.platform == "linux" else "spawn"
    pool = ProcessPoolExecutor(
        cores, multiprocessing.get_context(method), _begin, (task, os.getpid())
    )
    running: deque[Future[Tokenized]] = deque()
    try:
        wanted = 2 * cores
        while True:
            with _interrupts_waiting():
                for chunk in islice(todo, wanted):
                    running.append(pool.submit(_in_process, chunk))
                done = running.popleft().result() if running else None
            if done is None:
                return
            yield done
            wanted = 1
    except BrokenProcessPool as error:
        raise UserError(
            f"{task.path}: a process that tokenizes was killed, perhaps for want of memory. "
            "Run the same command again."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_waiting() -> Iterator[None]:
    """Ctrl-C waits for the end of this: the next chunk, as a rule a second at most.

    Python drops an exception that comes up while a process forks, and the build went on; one that
    comes while the pool starts, or between a lock's being taken and the block that gives it back,
    leaves the pool waiting for ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Signals reach the main thread alone.
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
        if came:
            signal.raise_signal(signal.SIGINT)


def number_of_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_task: Task | None = None


def _begin(task: Task, parent: int) -> None:
    """Start a process of the pool: it leaves Ctrl-C to its parent and ends with it."""
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _in_process(chunk: Chunk) -> Tokenized:
    assert _task is not None
    return tokenize_chunk(chunk, _task)


def _content_hash(record: formats.Record) -> int:
    """64 bits of what a record is about: of a preference pair the prompt, else all of it."""
    about: Any = record.value[0][:-1] if isinstance(record.value, tuple) else record.value
    text = about if isinstance(about, str) else json.dumps(about, ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
