"""Reader for data files: decompresses, detects the container and yields one item at a time.

    file -> decompressed (gzip, zstd) -> container -> items -> rows

An item is a line number and its content: the bytes of a JSON line, a parsed row, the text of a
document, or Broken with the reason. `parse` converts an item's content to a row, possibly in
another process. formats.py interprets rows.
"""

import codecs
import gzip
import importlib
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from trainlib.core.errors import UserError
from trainlib.core.files import download_problem
from trainlib.data import containers
from trainlib.data.containers import BOM, Broken, Item, Row, are_messages, json_error, utf8_error

CONTAINERS = ("jsonl", "array", "csv", "txt", "parquet")
SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".zst")

MAX_WINDOW = 128 << 20
"""Limit for the window of a zstd file, which is held in memory; `zstd --long` needs this much."""
MAX_ROW_GROUP = 2 << 30
"""Limit for the uncompressed size of a row group of a Parquet file, which is held in memory."""


class EmptyFileError(UserError):
    """Raised for a file without rows."""


class Source:
    """A data file; `position` is how many of its `size` bytes have been read.

    Raises UserError if the file is missing, empty or binary, or needs a package that is not
    installed. Iteration raises it if the compressed stream is damaged.
    """

    def __init__(self, path: Path, container: str = "auto",
                 max_row_mb: int = containers.MAX_ROW_MB) -> None:  # fmt: skip
        self.path, self.position, self._max_row = path, 0, max_row_mb << 20
        try:
            self.size = path.stat().st_size
            with path.open("rb") as file:
                start = file.read(4)
            self.compression = next((name for m, name in _MAGIC.items() if start.startswith(m)), "")
            problem = download_problem(path) if container == "auto" else ""
            if problem and not problem.startswith("is empty"):
                raise UserError(f"{path} {problem}.")
            if path.suffix.lower() == ".parquet" and start != b"PAR1" and not problem:
                raise UserError(f"{path} is not Parquet: it begins with {start!r}, not with PAR1.")
            if start == b"PAR1":
                self.container, self.reason = "parquet", "begins with PAR1"
            else:
                with self._open() as stream:
                    head = stream.read(1 << 16)
                self.container, self.reason = self._sniff(head)
        except _STREAM_ERRORS as error:
            raise self._unreadable(error) from error
        if container != "auto":
            self.container, self.reason = container, "set by data.format"

    def items(self) -> Iterator[Item]:
        """Yield all items in order; skip blank lines."""
        try:
            if self.container == "parquet":
                yield from self._parquet()
                return
            with self._open() as stream:
                for item in containers.READERS[self.container](stream, self._max_row):
                    self.position = self._raw.tell()
                    yield item
        except _STREAM_ERRORS as error:
            raise self._unreadable(error) from error
        self.position = self.size

    def _open(self) -> BinaryIO:
        self._raw = self.path.open("rb", buffering=1 << 20)
        if self.compression == "gzip":
            return gzip.GzipFile(fileobj=self._raw)  # type: ignore[return-value]
        if self.compression == "zstd":
            return io.BufferedReader(_ZstdStream(self._raw, self.path), 1 << 20)
        return self._raw

    def _sniff(self, head: bytes) -> tuple[str, str]:
        """Return the container and the reason for it, based on the first 64 KiB."""
        if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"{self.path} is UTF-16. Save it as UTF-8.")
        text = head.removeprefix(BOM).lstrip()
        if not text:
            raise EmptyFileError(f"{self.path} is empty: it needs at least one row")
        suffixes = [s for s in map(str.lower, self.path.suffixes) if s not in COMPRESSED]
        suffix = suffixes[-1] if suffixes else ""
        first = text.split(b"\n", 1)[0].rstrip()
        if text[:1] == b"[" and are_messages(_json(first)):
            return "jsonl", "each line is a list of messages"
        if text[:1] == b"[" and (text[1:].lstrip()[:1] in (b"{", b"]", b"") or suffix == ".json"):
            return "array", "begins with [ and {"
        if suffix in (".json", ".jsonl") or text[:1] == b"{" and (
            suffix not in (".txt", ".csv", ".tsv") or isinstance(_json(first), dict)
        ):  # fmt: skip
            return "jsonl", "begins with {" if text[:1] == b"{" else f"its name ends in {suffix}"
        if b"\0" in head:
            raise UserError(f"{self.path} is binary (zero byte at {head.index(0):,}). Pass a JSON, "
                            "CSV, text or Parquet file.")  # fmt: skip
        if suffix in (".csv", ".tsv"):
            return "csv", f"its name ends in {suffix}"
        columns = {c.strip(b' "').decode("utf-8", "replace") for c in re.split(rb"[,;\t]", first)}
        if any(known <= columns for known in _KNOWN_COLUMNS):
            return "csv", f"its first line names columns: {', '.join(sorted(columns))}"
        first_character = text[:4].decode("utf-8", "ignore")[:1]
        return "txt", f"begins with {first_character!r}, neither {{ nor a list of rows"

    def _parquet(self) -> Iterator[Item]:
        parquet = import_optional("pyarrow.parquet", self.path)
        arrow = import_optional("pyarrow", self.path)
        number = 0
        try:
            with parquet.ParquetFile(self.path, memory_map=True) as file:
                total = max(1, file.metadata.num_rows)
                groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
                # The sums are compared too, because a file may record another total.
                sizes = [max(g.total_byte_size, sum(g.column(i).total_uncompressed_size
                                                    for i in range(g.num_columns)))
                         for g in groups]  # fmt: skip
                if (largest := max(sizes, default=0)) > MAX_ROW_GROUP:
                    raise UserError(
                        f"{self.path}: row group {sizes.index(largest)} has "
                        f"{largest / 2**30:,.1f} GB uncompressed; the limit is "
                        f"{MAX_ROW_GROUP >> 30} GB. Write the file again in smaller row groups "
                        "(pyarrow.parquet.write_table(..., row_group_size=10_000))."
                    )
                columns = file.schema_arrow.names
                if twice := sorted({name for name in columns if columns.count(name) > 1}):
                    yield Item(1, Broken(f"two columns are named {twice[0]!r}; rename one"))
                    return
                # A value that is stored once may be in each row of a batch.
                num_rows = max(1, min(512, 2 * self._max_row // max(1, largest)))
                for batch in file.iter_batches(batch_size=num_rows):
                    for row in self._rows(batch):
                        number += 1
                        self.position = self.size * number // total
                        yield Item(number, row)
        except UserError:
            raise
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"{self.path}, after row {number}: damaged Parquet: {error}") from error
        except (OverflowError, ValueError, RecursionError) as error:
            # For example, a date after the year 9999.
            raise UserError(
                f"{self.path}, after row {number}: a value that cannot be read: {error}. Cast the "
                "column to a string or remove it."
            ) from error

    def _rows(self, batch: Any) -> Iterator[Row | Broken]:
        """Yield the rows of a batch; one at a time if any may be too long."""
        small = batch.nbytes <= self._max_row
        for part in [batch] if small else (batch.slice(i, 1) for i in range(batch.num_rows)):
            if part.nbytes > self._max_row:
                yield containers.too_long(self._max_row)
                continue
            for row in part.to_pylist(maps_as_pydicts="lossy"):
                yield {key: _plain(value) for key, value in row.items()}

    def _unreadable(self, error: Exception) -> UserError:
        if isinstance(error, FileNotFoundError):
            return UserError(f"{self.path} does not exist")
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            return UserError(f"{self.path} cannot be read: {error.strerror or error}")
        return UserError(
            f"{self.path}: the compressed stream is damaged or truncated after "
            f"{self.position:,} of {self.size:,} bytes ({error}). Download or copy the file again."
        )


def parse(content: bytes | str | Row | Broken) -> Row:
    """Return the row in an item's content; raise ValueError with the reason if it is broken."""
    if isinstance(content, bytes):
        try:
            content = containers.row_of(containers.load_json(content.decode("utf-8")))
        except UnicodeDecodeError as error:
            raise ValueError(utf8_error(content, error.start)) from error
        except ValueError as error:
            reason = json_error(error)
            start = content[:60].decode("utf-8", "replace").strip()
            raise ValueError(f"not JSON ({reason}): {start!r}. Each line must be one complete JSON "
                             "object (jq -c . FILE > NEW writes it so)") from error  # fmt: skip
    if isinstance(content, Broken):
        raise ValueError(content.reason)
    return {"text": content} if isinstance(content, str) else content


def import_optional(module: str, path: Path) -> Any:
    """Import an optional package; raise UserError with the install command if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{path} needs the package {module.split('.')[0]}, which is not installed. "
                        "Run:\n  pip install -r requirements-data.txt") from error  # fmt: skip


# ---- compression ---------------------------------------------------------------------------------


class _ZstdStream(io.RawIOBase):
    """Stream of decompressed zstd frames; unlike zstandard's reader, it detects truncation."""

    def __init__(self, raw: BinaryIO, path: Path) -> None:
        zstandard = import_optional("zstandard", path)
        self._error = zstandard.ZstdError
        self._make = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj
        self._raw, self._frame, self._path = raw, None, path
        self._ready, self._rest = memoryview(b""), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            # A block may become 30,000 times as long.
            block = self._rest or self._raw.read(1 << 11)
            self._rest = b""
            if not block:
                if self._frame is not None:
                    raise EOFError("the last frame is incomplete")
                return 0
            self._frame = self._frame or self._make()
            try:
                self._ready = memoryview(self._frame.decompress(block))
            except self._error as error:
                if "too much memory" in str(error):
                    raise UserError(
                        f"{self._path} needs a zstd window of more than {MAX_WINDOW >> 20} MB, the "
                        f"limit. Run: zstd -d --long=31 {self._path}"
                    ) from error
                raise EOFError(str(error)) from error
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


_STREAM_ERRORS = (OSError, EOFError, zlib.error)
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_KNOWN_COLUMNS = ({"instruction", "output"}, {"prompt", "completion"}, {"chosen", "rejected"},
                  {"q", "a"}, {"text", "source"})  # fmt: skip


def _plain(value: Any) -> Any:
    """Convert a Parquet value to what JSON can hold."""
    if isinstance(value, dict):  # A struct has all fields of any row; null: this row lacks one.
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)


def _json(raw: bytes) -> Any:
    try:
        return containers.load_json(raw.decode("utf-8", "replace"))
    except ValueError:
        return None
