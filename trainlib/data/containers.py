"""What lies in a decompressed file: JSON lines, one JSON array, CSV or running text, as items.

Each reader takes a stream of bytes and yields one Item a row, in flat memory, and goes on after a
broken one. readers.py says which of them a file needs.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

Row = dict[str, Any]

BOM = b"\xef\xbb\xbf"
MAX_ROW_BYTES = 64 << 20
"""Longer rows are broken: one is held in memory whole."""
DOCUMENT_BYTES = 8 << 10
"""A document of a plain text ends at the first blank line after so many bytes, ..."""
MAX_DOCUMENT_BYTES = 16 << 10
"""... or else at the first end of a line after so many."""
NOT_UTF8 = "not UTF-8"
GBK_CURE = "looks like GBK/GB18030. Type: iconv -f gb18030 -t utf-8 FILE > NEW"
DOCUMENT_END = b"<|endoftext|>"


class Broken(NamedTuple):
    """Why an item is no row."""

    reason: str


class Item(NamedTuple):
    """What stands at a line (of Parquet: the number of the row), counted from 1."""

    line: int
    content: bytes | str | Row | Broken


def are_messages(value: Any) -> bool:
    """Is this a list of {"role": ...}, so a conversation."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and "role" in turn for turn in value)
    )


def row_of(value: Any) -> Row | Broken:
    """Return a JSON value as a row: an object, or a list of messages under "messages"."""
    if isinstance(value, dict):
        return value
    if are_messages(value):
        return {"messages": value}
    return Broken(f"a JSON {json_type(value)}, where an object is needed")


def json_type(value: Any) -> str:
    """What JSON calls the type of a value."""
    types = {"null": type(None), "boolean": bool, "number": (int, float), "string": str,
             "array": list, "object": dict}  # fmt: skip
    return next((n for n, type_ in types.items() if isinstance(value, type_)), type(value).__name__)


def not_utf8(raw: bytes, place: int) -> str:
    """Why bytes with a wrong one at `place` are no text, and how they become one."""
    fix = f", which {GBK_CURE}" if looks_like_gbk(raw) else ". Save the file as UTF-8"
    return f"{NOT_UTF8} (byte {raw[place]:#04x} at {place}){fix}"


def looks_like_gbk(raw: bytes) -> bool:
    """Do bytes that are no UTF-8 decode as GB18030, most of them to the common characters."""
    start = re.search(rb"[\x80-\xff]", raw)
    beginning = raw[start.start() :][:200] if start else b""
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(beginning)
    except UnicodeDecodeError:
        return False
    # Other encodings of a byte a letter decode too, but to characters that are seldom seen.
    wide = "".join(c for c in text if not c.isascii())
    return len(wide.encode("gb2312", "ignore")) > len(wide)


def invalid_json(error: Exception) -> str:
    """What json says of a text, in short."""
    # A ValueError that is no JSONDecodeError: a number of more digits than Python reads.
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)[:80]


# ---- containers ----------------------------------------------------------------------------------


def read_jsonl(stream: BinaryIO) -> Iterator[Item]:
    """Lines that are not blank, as bytes: parsing them is left to another process."""
    number = 0
    while raw := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if number == 1:
            raw = raw.removeprefix(BOM)
        if len(raw) > MAX_ROW_BYTES:
            while not raw.endswith(b"\n") and (raw := stream.readline(MAX_ROW_BYTES)):
                pass
            yield Item(number, Broken(f"longer than {MAX_ROW_BYTES >> 20} MiB"))
        elif raw.strip():
            yield Item(number, raw)


def read_array(stream: BinaryIO) -> Iterator[Item]:
    """Elements of one JSON array; after a broken one it goes on at the next that begins alike."""
    # Bytes that are no UTF-8 become lone surrogates, which every reader of text refuses.
    text = _Window(io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="\n"))
    text.skip(r"\s*\[\s*")
    decoder, alike = json.JSONDecoder(), re.compile(r"\}\s*,\s*(?=\{)")
    while True:
        text.skip(r"\s*")
        if text.starts_with("]"):
            break
        line = text.line
        try:
            value, end = text.decode(decoder)
        except (ValueError, RecursionError) as error:
            yield Item(line, Broken(f"not JSON ({invalid_json(error)}), in an array"))
            if not text.skip_past(alike):
                return
            continue
        if isinstance(value, dict) and value and alike.groups == 0:
            # Nested objects begin with other keys.
            key = re.escape(json.dumps(next(iter(value)), ensure_ascii=False))
            alike = re.compile(r"(\})\s*,\s*(?=\{\s*" + key + ")")
        yield Item(line, row_of(value))
        text.advance(end)
        text.skip(r"\s*")
        if text.starts_with(","):
            text.advance(1)
        elif not text.starts_with("]"):
            what = "the array has no end" if text.at_end() else "no comma between two rows"
            yield Item(text.line, Broken(f"not JSON ({what})"))
            if not text.skip_past(alike):
                return
    text.advance(1)
    text.skip(r"\s*")
    if not text.at_end():
        yield Item(text.line, Broken("text after the end of the array"))


class _Window:
    """The part of a long text that is being looked at."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream, self._text, self._start, self.line = stream, "", 0, 1

    def _more(self, size: int = 1 << 20) -> bool:
        piece = self._stream.read(size)
        self._text, self._start = self._text[self._start :] + piece, 0
        return bool(piece)

    def advance(self, end: int) -> None:
        """Go on `end` characters further."""
        self.line += self._text.count("\n", self._start, self._start + end)
        self._start += end

    def skip(self, pattern: str) -> None:
        """Go past what matches here."""
        while True:
            match = re.compile(pattern).match(self._text, self._start)
            size = match.end() - self._start if match else 0
            if self._start + size < len(self._text) or not self._more():
                break
        self.advance(size)

    def skip_past(self, pattern: re.Pattern[str]) -> bool:
        """Go past the next match; False where the text ends without one."""
        while True:
            if match := pattern.search(self._text, self._start):
                self.advance(match.end() - self._start)
                return True
            self.advance(max(0, len(self._text) - self._start - 4096))
            if not self._more():
                return False

    def starts_with(self, text: str) -> bool:
        return self._text.startswith(text, self._start)

    def at_end(self) -> bool:
        return self._start == len(self._text) and not self._more()

    def decode(self, decoder: json.JSONDecoder) -> tuple[Any, int]:
        """The JSON value that begins here and its length; raises ValueError."""
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._start)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16
                size = len(self._text) - self._start
                if not cut or size > MAX_ROW_BYTES or not self._more(max(size, 1 << 20)):
                    raise
            else:
                return value, end - self._start


def read_csv(stream: BinaryIO) -> Iterator[Item]:
    """Rows by the names of the first line; comma, semicolon or tab, whichever it has most."""
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(MAX_ROW_BYTES)
    header = lines.readline()
    delimiter = max(",;\t", key=header.count)
    columns = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    reader, before = csv.reader(lines, delimiter=delimiter), 1
    while True:
        line = before + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Item(line, Broken(f"not CSV ({error})"))
            before += reader.line_num
            reader = csv.reader(lines, delimiter=delimiter)
            continue
        if cells and len(cells) != len(columns):
            yield Item(line, Broken(f"{len(cells)} cells, where the header names {len(columns)}"))
        elif cells:
            yield Item(line, dict(zip(columns, cells, strict=True)))


def read_txt(stream: BinaryIO) -> Iterator[Item]:
    """Documents of running text: see DOCUMENT_BYTES; a line of <|endoftext|> always ends one."""
    number, begin, size, parts = 0, 1, 0, []
    rest = b""

    def document() -> Iterator[Item]:
        raw = b"".join(parts).replace(b"\r\n", b"\n").strip(b"\n")
        if raw.strip():
            try:
                yield Item(begin, raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                start = raw.rfind(b"\n", 0, error.start) + 1
                place = begin + raw.count(b"\n", 0, start)
                yield Item(place, Broken(not_utf8(raw[start:], error.start - start)))

    while (raw := rest + stream.readline(MAX_DOCUMENT_BYTES)) != b"":
        # A line longer than a document is cut, but not within a character.
        rest = b"" if raw.endswith(b"\n") else _unfinished_character(raw)
        if rest and len(raw) == len(rest):
            rest = b""  # The end of the file, or no UTF-8 at all.
        raw = raw[: len(raw) - len(rest)]
        if number == 0 and not parts:
            raw = raw.removeprefix(BOM)
        number += raw.endswith(b"\n")
        separator = raw.strip() == DOCUMENT_END
        if not separator:
            parts.append(raw)
            size += len(raw)
        limit = MAX_DOCUMENT_BYTES if raw.strip() else DOCUMENT_BYTES
        if separator or size >= limit:
            yield from document()
            begin, size, parts = number + 1, 0, []
    yield from document()


def _unfinished_character(raw: bytes) -> bytes:
    """The bytes at the end that begin a character of UTF-8 and do not end it."""
    for back in range(1, min(4, len(raw) + 1)):
        byte = raw[-back]
        if byte >= 0xC0:
            wanted = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return raw[-back:] if back < wanted else b""
        if byte < 0x80:
            break
    return b""
