"""Readers for decompressed files: JSON lines, JSON array, CSV, plain text.

Each reader takes a byte stream and yields one Item per row. It uses constant memory and continues
after a broken row. readers.py selects the reader for a file.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

Row = dict[str, Any]

BOM = b"\xef\xbb\xbf"
MAX_ROW_MB = 256
"""Default of data.max_row_mb. Longer rows are broken, because a row is held in memory."""
MAX_NESTING = 200  # JSON values nested more deeply are broken.
DOCUMENT_BYTES = 8 << 10  # A plain-text document ends at the first blank line after this many
MAX_DOCUMENT_BYTES = 16 << 10  # bytes, or at the first line break after this many.
NOT_UTF8 = "not UTF-8"
TOO_DEEP = f"nested more than {MAX_NESTING} levels deep, the limit; flatten the row or remove it"
GBK_FIX = "looks like GBK/GB18030. Run: iconv -f gb18030 -t utf-8 FILE > NEW"
DOCUMENT_END = b"<|endoftext|>"


class Broken(NamedTuple):
    """The reason why an item is not a valid row."""

    reason: str


class Item(NamedTuple):
    """A line or a Parquet row: its number, counted from 1, and its content."""

    line: int
    content: bytes | str | Row | Broken


def is_turn(value: Any) -> bool:
    """Return whether a value is a message: an object with "role" or "from"."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


def are_messages(value: Any) -> bool:
    """Return whether a value is a conversation: a non-empty list of messages."""
    return isinstance(value, list) and bool(value) and all(map(is_turn, value))


def row_of(value: Any) -> Row | Broken:
    """Convert a JSON value to a row: an object, or a list of messages as {"messages": [...]}."""
    if isinstance(value, dict):
        return value
    if are_messages(value):
        return {"messages": value}
    return Broken(f"a JSON {json_type(value)} instead of an object")


def json_type(value: Any) -> str:
    """Return the JSON name of a value's type."""
    types = {"null": type(None), "boolean": bool, "number": (int, float), "string": str,
             "array": list, "object": dict}  # fmt: skip
    return next((n for n, type_ in types.items() if isinstance(value, type_)), type(value).__name__)


def utf8_error(raw: bytes, position: int) -> str:
    """Return the error message for an invalid byte at `position`, including the fix."""
    fix = f", which {GBK_FIX}" if looks_like_gbk(raw) else ". Save the file as UTF-8"
    return f"{NOT_UTF8} (byte {raw[position]:#04x} at {position}){fix}"


def looks_like_gbk(raw: bytes) -> bool:
    """Return whether bytes decode as GB18030, mostly to common characters."""
    start = re.search(rb"[\x80-\xff]", raw)
    sample = raw[start.start() :][:200] if start else b""
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(sample)
    except UnicodeDecodeError:
        return False
    # Text in a single-byte encoding also decodes, but mostly to rare characters.
    wide = "".join(c for c in text if not c.isascii())
    return len(wide.encode("gb2312", "ignore")) > len(wide)


def too_long(limit: int) -> Broken:
    """Return the reason why a row of more than `limit` bytes is broken."""
    return Broken(
        f"longer than {limit >> 20} MB, the limit of data.max_row_mb. Split the row, or set "
        "data.max_row_mb to a larger number (a row takes up to ten times its size in memory)"
    )


def check_nesting(value: Any, text: str, levels: int = MAX_NESTING) -> None:
    """Raise ValueError if a value, which was read from `text`, is nested too deeply."""
    if text and text.count("{") + text.count("[") <= levels or not isinstance(value, (dict, list)):
        return
    if not levels:
        raise ValueError(TOO_DEEP)
    for child in value.values() if isinstance(value, dict) else value:
        check_nesting(child, "", levels - 1)


def load_json(text: str, decode: Callable[[str], Any] = json.loads) -> Any:
    """Return a JSON value; raise ValueError if it is invalid or nested too deeply."""
    try:
        value = decode(text)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    check_nesting(value, text)
    return value


def json_error(error: Exception) -> str:
    """Return a short message for an error raised by the json module."""
    # Any other ValueError is due to a number with more digits than Python accepts.
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)[:80]


# ---- containers ----------------------------------------------------------------------------------


def read_jsonl(stream: BinaryIO, limit: int = MAX_ROW_MB << 20) -> Iterator[Item]:
    """Yield the non-blank lines as bytes, which another process may parse."""
    number = 0
    while raw := stream.readline(limit + 1):
        number += 1
        if number == 1:
            raw = raw.removeprefix(BOM)
        if len(raw) > limit:
            while not raw.endswith(b"\n") and (raw := stream.readline(1 << 20)):
                pass
            yield Item(number, too_long(limit))
        elif raw.strip():
            yield Item(number, raw)


def read_array(stream: BinaryIO, limit: int = MAX_ROW_MB << 20) -> Iterator[Item]:
    """Yield the elements of a JSON array; after a broken one, resume at the next likely row."""
    # Invalid UTF-8 becomes lone surrogates, which check_text rejects.
    text = _Window(io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="\n"), limit)
    text.advance(text.next() == "[")
    next_row = re.compile(r"\}\s*,\s*(?=\{)")
    while text.next() != "]":
        line = text.line
        try:
            value = text.decode()
        except (OverflowError, ValueError) as error:
            broken = Broken(f"array element is not JSON ({json_error(error)})")
            yield Item(line, too_long(limit) if isinstance(error, OverflowError) else broken)
            if not text.skip_past(next_row):
                return
            continue
        if isinstance(value, dict) and value and next_row.groups == 0:
            # Search for the first key of a row, since nested objects have other keys.
            key = re.escape(json.dumps(next(iter(value)), ensure_ascii=False))
            next_row = re.compile(r"(\})\s*,\s*(?=\{\s*" + key + ")")
        yield Item(line, value if isinstance(value, Broken) else row_of(value))
        if (after := text.next()) not in (",", "]"):
            reason = "missing comma between rows" if after else "array is not closed"
            yield Item(text.line, Broken(f"not JSON ({reason})"))
            if not text.skip_past(next_row):
                return
        text.advance(after == ",")
    text.advance(1)
    if text.next():
        yield Item(text.line, Broken("text after the end of the array"))


class _Window:
    """A position in a long text; only the text around it is in memory."""

    _decoder, _spaces = json.JSONDecoder(), re.compile(r"\s*")

    def __init__(self, stream: io.TextIOWrapper, limit: int) -> None:
        self._stream, self._limit, self._text, self._start, self.line = stream, limit, "", 0, 1

    def _read_more(self, size: int = 1 << 20) -> bool:
        piece = self._stream.read(size)
        self._text, self._start = self._text[self._start :] + piece, 0
        return bool(piece)

    def advance(self, end: int) -> None:
        """Move `end` characters forward."""
        self.line += self._text.count("\n", self._start, self._start + end)
        self._start += end

    def next(self) -> str:
        """Move past white space; return the next character, or an empty string at the end."""
        while True:
            if spaces := self._spaces.match(self._text, self._start):
                self.advance(spaces.end() - self._start)
            if self._start < len(self._text) or not self._read_more():
                return self._text[self._start : self._start + 1]

    def skip_past(self, pattern: re.Pattern[str]) -> bool:
        """Move past the next match; return False if there is none."""
        while True:
            if match := pattern.search(self._text, self._start):
                self.advance(match.end() - self._start)
                return True
            self.advance(max(0, len(self._text) - self._start - 4096))
            if not self._read_more():
                return False

    def decode(self) -> Any:
        """Return the JSON value here and move past it.

        Raises ValueError if it is invalid or nested too deeply, OverflowError if it is too long.
        """
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._start)
                text = self._text[self._start : end]
                check_nesting(value, text)
            except json.JSONDecodeError as error:
                partial = error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16
                size = len(self._text) - self._start
                if partial and size > self._limit:
                    raise OverflowError from error
                if not partial or not self._read_more(max(size, 1 << 20)):
                    raise
            except RecursionError as error:
                raise ValueError(TOO_DEEP) from error
            else:
                self.advance(len(text))
                return too_long(self._limit) if len(text) > self._limit else value


def _csv_lines(text: io.TextIOWrapper, limit: int) -> Iterator[str]:
    """Yield the lines of one row; raise csv.Error if they are too long together."""
    size = 0
    while line := text.readline(limit + 1):
        size += len(line)
        if size > limit:
            while line and not line.endswith(("\n", "\r")):
                line = text.readline(1 << 20)
            raise csv.Error(too_long(limit).reason)
        yield line


def read_csv(stream: BinaryIO, limit: int = MAX_ROW_MB << 20) -> Iterator[Item]:
    """Yield rows as dicts keyed by the header; the delimiter is a comma, semicolon or tab."""
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    csv.field_size_limit(limit)
    try:
        header = next(_csv_lines(text, limit), "")
    except csv.Error as error:
        yield Item(1, Broken(f"not CSV ({error})"))
        return
    raw = header.encode("utf-8", "surrogateescape")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        yield Item(1, Broken(utf8_error(raw, error.start)))
        return
    delimiter = max(",;\t", key=header.count)
    columns = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    if twice := sorted({name for name in columns if name and columns.count(name) > 1}):
        yield Item(1, Broken(f"two columns are named {twice[0]!r}; rename one"))
        return
    line, cells = 2, []
    while cells is not None:
        reader = csv.reader(_csv_lines(text, limit), delimiter=delimiter)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Item(line, Broken(f"not CSV ({error})"))
            cells = []
        if cells and len(cells) != len(columns):
            yield Item(line, Broken(f"{len(cells)} cells, but the header has {len(columns)}"))
        elif cells:
            pairs = zip(columns, cells, strict=True)
            yield Item(line, {name: cell for name, cell in pairs if name or cell})
        line += reader.line_num


def read_txt(stream: BinaryIO, limit: int = 0) -> Iterator[Item]:
    """Yield plain-text documents, split at <|endoftext|> lines or when they reach a size limit."""
    number, begin, size, parts = 0, 1, 0, []
    rest = b""

    def document() -> Iterator[Item]:
        raw = b"".join(parts).replace(b"\r\n", b"\n").strip(b"\n")
        if raw.strip():
            try:
                yield Item(begin, raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                start = raw.rfind(b"\n", 0, error.start) + 1
                line = begin + raw.count(b"\n", 0, start)
                yield Item(line, Broken(utf8_error(raw[start:], error.start - start)))

    while raw := rest + stream.readline(MAX_DOCUMENT_BYTES):
        rest = b""
        if not raw.endswith(b"\n"):
            # A line longer than a document is split, but never within a character.
            decoder = codecs.getincrementaldecoder("utf-8")("ignore")
            decoder.decode(raw[-4:])
            rest, _ = decoder.getstate()
        if len(raw) == len(rest):
            rest = b""  # The end of the file, or not UTF-8 at all.
        raw = raw[: len(raw) - len(rest)]
        if number == 0 and not parts:
            raw = raw.removeprefix(BOM)
        number += raw.endswith(b"\n")
        separator = raw.strip() == DOCUMENT_END
        if not separator:
            parts.append(raw)
            size += len(raw)
        if separator or size >= (MAX_DOCUMENT_BYTES if raw.strip() else DOCUMENT_BYTES):
            yield from document()
            begin, size, parts = number + 1, 0, []
    yield from document()


READERS = {"jsonl": read_jsonl, "array": read_array, "csv": read_csv, "txt": read_txt}
