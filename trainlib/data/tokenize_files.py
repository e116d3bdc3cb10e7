"""Tokenization of a file in chunks, on all cores if the file is large.

read_chunks       a file -> items, about a megabyte at a time
tokenize_chunk    a chunk -> ids, loss mask, lines, hashes, and its broken rows
tokenize_chunks   all chunks, in order
"""

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
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

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
SMALL_FILE_BYTES = 8 << 20  # Below this size, worker processes cost more time than they save.


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


class WorkerKilledError(UserError):
    """Raised for a line whose worker process was killed twice; the progress is kept."""


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
    num_items: int
    position: int


def read_chunks(source: Source, skip: int = 0, interrupted: Sequence[int] = ()) -> Iterator[Chunk]:
    """Yield a file's items, without the first `skip`; stop if `interrupted` is no longer empty."""
    items: list[Item] = []
    size = 0
    for number, item in enumerate(source.items()):
        if interrupted:
            raise KeyboardInterrupt
        if number >= skip:
            items.append(item)
            size += _size(item.content)
        if size >= CHUNK_BYTES:
            yield Chunk(items, source.position)
            items, size = [], 0
    if items:
        yield Chunk(items, source.position)


def tokenize_chunk(chunk: Chunk, task: Task) -> Tokenized:
    """Return the ids and loss mask of a chunk's records, and its broken rows."""
    # Extending these is several times faster than extending NumPy arrays.
    ids, mask = array(task.tokenizer.typecode), bytearray()
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
            hashes.append(_content_hash(record))
            for sequence in ENCODERS[task.kind](task.tokenizer, record):
                ids += sequence.ids
                mask += sequence.mask
                lengths.append(len(sequence.ids))
            lines.append(line)
            sources.append(names.setdefault(record.source, len(names)))
    return Tokenized(np.frombuffer(ids, ids.typecode), np.frombuffer(mask, np.uint8),
                     np.array(lengths, np.int64), np.array(lines, np.int64),
                     np.array(hashes, np.uint64), np.array(sources, np.int64), list(names), broken,
                     counts, len(chunk.items), chunk.position)  # fmt: skip


def tokenize_chunks(chunks: Iterator[Chunk], task: Task, source: Source) -> Iterator[Tokenized]:
    """Yield the tokenized chunks in order; use all cores for a large file."""
    cores = num_usable_cores()
    small = source.size < (SMALL_FILE_BYTES // 4 if source.compression else SMALL_FILE_BYTES)
    if small or cores == 1:
        yield from (tokenize_chunk(chunk, task) for chunk in chunks)
        return
    pool = _make_pool(cores, task)
    waiting, running = deque[Chunk](), deque[Future[Tokenized]]()
    try:
        while True:
            waiting.extend(islice(chunks, 2 * cores - len(waiting)))
            if not waiting:
                return
            try:
                while len(running) < len(waiting):
                    running.append(pool.submit(_tokenize_in_worker, waiting[len(running)]))
                tokenized = [running.popleft().result()]
            except BrokenProcessPool:
                pool.shutdown()
                running.clear()
                tokenized = _tokenize_alone(waiting[0], task)
                pool = _make_pool(cores, task)
            waiting.popleft()
            yield from tokenized
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _make_pool(cores: int, task: Task) -> ProcessPoolExecutor:
    # fork shares loaded memory, but with threads it is safe only on Linux.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    return ProcessPoolExecutor(cores, context, _init_worker, (task, os.getpid()))


def _tokenize_alone(chunk: Chunk, task: Task) -> Iterator[Tokenized]:
    """Tokenize a chunk's items one by one while nothing else runs; name the line that kills."""
    log.warning("%s: a worker process was killed, possibly because memory ran out; lines %d to %d "
                "are tokenized again, alone", task.path, chunk.items[0].line,
                chunk.items[-1].line)  # fmt: skip
    with _make_pool(1, task) as pool:
        for item in chunk.items:
            try:
                yield pool.submit(_tokenize_in_worker, Chunk([item], chunk.position)).result()
            except BrokenProcessPool as error:
                raise WorkerKilledError(
                    f"{task.path}, line {item.line}: the process that tokenizes this line was "
                    "killed twice, possibly because memory ran out. Free some memory and run the "
                    "same command again, which continues here, or shorten or remove the line."
                ) from error


@contextlib.contextmanager
def delayed_interrupts() -> Iterator[list[int]]:
    """Delay Ctrl-C until the block ends; yield a list to which each one is added.

    Python drops an exception raised in a callback, such as those that follow an import or a fork.
    One raised while the pool starts, or just after it acquires a lock, makes it hang.
    """
    received: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    # Only the main thread receives signals, and the user may have chosen to ignore them.
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield received
        return
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, handler)
    if received:
        raise KeyboardInterrupt


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


def _size(content: Any) -> int:
    if isinstance(content, (bytes, str)):
        return len(content)
    if isinstance(content, dict):
        return sum(map(_size, content.values()))
    return sum(map(_size, content)) if isinstance(content, (list, tuple)) else 8


def _content_hash(record: formats.Record) -> int:
    """Return a 64-bit hash of a record's content (of the prompt, for a preference pair)."""
    content: Any = record.value
    if isinstance(content, tuple):
        content = content[0][: prompt_size(*content)]
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
