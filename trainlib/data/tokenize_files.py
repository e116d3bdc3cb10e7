"""Tokenization of a file in chunks, on all cores if the file is large.

read_chunks       a file -> items, about a megabyte at a time
tokenize_chunk    a chunk -> ids, loss mask, lines, hashes, and its broken rows
tokenize_chunks   all chunks, in order
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
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenizer.bpe import Tokenizer
from trainlib.core.errors import UserError
from trainlib.data import formats
from trainlib.data.containers import Item
from trainlib.data.conversations import prompt_size
from trainlib.data.encode import ENCODERS
from trainlib.data.findings import Counts
from trainlib.data.readers import Source

CHUNK_BYTES = 1 << 20
PARSED_BYTES = 1000
"""Assumed size of an already parsed row."""
SMALL_FILE_BYTES = 8 << 20
"""Below this size, worker processes cost more time than they save."""


class Chunk(NamedTuple):
    """Consecutive items and the file position after them."""

    items: list[Item]
    position: int


@dataclass(frozen=True)
class Task:
    """Everything needed to tokenize a chunk of a file."""

    path: Path
    kind: str
    tokenizer: Tokenizer
    options: formats.ReadOptions


class Tokenized(NamedTuple):
    """A tokenized chunk: ids and supervised per id, lengths per sequence, the rest per record."""

    ids: np.ndarray
    supervised: np.ndarray
    lengths: np.ndarray
    lines: np.ndarray
    hashes: np.ndarray
    sources: np.ndarray
    source_names: list[str]
    broken: list[tuple[int, str]]
    counts: Counts
    position: int


def read_chunks(source: Source, skip: int = 0) -> Iterator[Chunk]:
    """Yield a file's items in chunks, without the first `skip`; chunking is deterministic."""
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
    """Return the ids and loss mask of a chunk's records, and its broken rows."""
    # Extending these is several times faster than extending NumPy arrays.
    ids, mask = array("I"), bytearray()
    lengths, lines, hashes, sources = [], [], [], []
    names: dict[str, int] = {}
    broken: list[tuple[int, str]] = []
    counts = Counts()
    items = formats.check_items(chunk.items, task.path, task.kind, task.options, counts)
    for line, records in items:
        if isinstance(records, formats.Broken):
            broken.append((line, records.reason))
            continue
        for record in records:
            for sequence in ENCODERS[task.kind](task.tokenizer, record):
                ids.fromlist(sequence.ids)
                mask += bytes(sequence.mask)
                lengths.append(len(sequence.ids))
            lines.append(line)
            hashes.append(_content_hash(record))
            sources.append(names.setdefault(record.source, len(names)))
    return Tokenized(
        np.frombuffer(ids, np.uint32), np.frombuffer(mask, np.uint8), np.array(lengths, np.int64),
        np.array(lines, np.int64), np.array(hashes, np.uint64), np.array(sources, np.int64),
        list(names), broken, counts, chunk.position,
    )  # fmt: skip


def tokenize_chunks(chunks: Iterator[Chunk], task: Task, source: Source) -> Iterator[Tokenized]:
    """Yield the tokenized chunks in order; use all cores for a large file."""
    cores = num_usable_cores()
    small = source.size < (SMALL_FILE_BYTES // 4 if source.compression else SMALL_FILE_BYTES)
    if small or cores == 1:
        yield from (tokenize_chunk(chunk, task) for chunk in chunks)
        return
    # fork shares loaded memory, but with threads it is safe only on Linux.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(cores, context, _init_worker, (task, os.getpid()))
    running: deque[Future[Tokenized]] = deque()
    try:
        num_to_submit = 2 * cores
        while True:
            with _defer_interrupts():
                for chunk in islice(chunks, num_to_submit):
                    running.append(pool.submit(_tokenize_in_worker, chunk))
                tokenized = running.popleft().result() if running else None
            if tokenized is None:
                return
            yield tokenized
            num_to_submit = 1
    except BrokenProcessPool as error:
        raise UserError(
            f"{task.path}: a worker process was killed, possibly because memory ran out. "
            "Run the same command again."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _defer_interrupts() -> Iterator[None]:
    """Delay Ctrl-C until the block ends, usually within a second.

    Python drops an exception raised while a process forks. One raised while the pool starts, or
    between acquiring a lock and entering the block that releases it, makes the pool hang.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread receives signals.
        return
    received: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
        if received:
            signal.raise_signal(signal.SIGINT)


def num_usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_task: Task  # Set in each worker process.


def _init_worker(task: Task, parent: int) -> None:
    """Set up a worker process: it ignores Ctrl-C and exits with its parent."""
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _tokenize_in_worker(chunk: Chunk) -> Tokenized:
    return tokenize_chunk(chunk, _task)


def _content_hash(record: formats.Record) -> int:
    """Return a 64-bit hash of a record's content (of the prompt, for a preference pair)."""
    content: Any = record.value
    if isinstance(content, tuple):
        content = content[0][: prompt_size(*content)]
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
