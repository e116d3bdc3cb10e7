"""Any accepted file to records: documents, conversations, preference pairs.

A file is JSON lines: one object a line. Its kind is detected from its first object's keys:

    pretrain   {"text": "..."}
    sft        {"conversations": [{"role": "user", "content": "..."}, ...]}
    dpo        {"chosen": [messages], "rejected": [messages]}     the shared prefix is the prompt

Further keys are left alone; "source", where a row has one, names its kind in reports.
Every problem is a UserError that names file, line, reason and cure; nothing is skipped silently.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizer.chat_format import ROLES
from trainlib.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One row of a file, checked: `value` is a text, a conversation, or (chosen, rejected)."""

    value: Any
    source: str
    path: Path
    line: int


@dataclass(frozen=True)
class Format:
    """One kind of row: how to recognise it, and how to check one and take its content."""

    name: str
    kind: str
    matches: Callable[[Row], bool]
    read: Callable[[Row], Any]


def read_text(row: Row) -> str:
    """The document of a pretraining row; raises ValueError where it is no text or empty."""
    text = row["text"]
    if not isinstance(text, str):
        raise ValueError(f'"text" must be a string, not {type(text).__name__}')
    if not text:
        raise ValueError('"text" is empty')
    _check_unicode(text)
    return text


def read_conversation(row: Row, key: str = "conversations") -> list[dict[str, str]]:
    """The messages of a row; raises ValueError unless they are turns with an assistant's among."""
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f'"{key}" must be a list of messages with at least one')
    messages: list[dict[str, str]] = []
    for number, turn in enumerate(turns, 1):
        place = f'"{key}" message {number}'
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise ValueError(f'{place} must be an object with "role" and "content"')
        if turn["role"] not in ROLES:
            raise ValueError(f"{place}: role {turn['role']!r} is none of {', '.join(ROLES)}")
        if not isinstance(turn["content"], str):
            raise ValueError(f'{place}: "content" must be a string')
        _check_unicode(turn["content"])
        messages.append({"role": turn["role"], "content": turn["content"]})
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f'"{key}" has no assistant message, so nothing to learn')
    return messages


def read_preference(row: Row) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Chosen and rejected conversation; raises ValueError unless only the last answer differs."""
    chosen, rejected = read_conversation(row, "chosen"), read_conversation(row, "rejected")
    for key, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise ValueError(f'"{key}" must end with an assistant message')
    if chosen[:-1] != rejected[:-1]:
        raise ValueError('"chosen" and "rejected" have different prompts (all but the last turn)')
    if chosen[-1] == rejected[-1]:
        raise ValueError('"chosen" and "rejected" are the same answer')
    return chosen, rejected


FORMATS: tuple[Format, ...] = (
    Format("text JSONL", "pretrain", lambda row: "text" in row, read_text),
    Format("conversations JSONL", "sft", lambda row: "conversations" in row, read_conversation),
    Format(
        "chosen/rejected JSONL",
        "dpo",
        lambda row: "chosen" in row and "rejected" in row,
        read_preference,
    ),
)
EXPECTED = {
    "pretrain": '{"text": "..."}',
    "sft": '{"conversations": [{"role": "user", "content": "..."}, ...]}',
    "dpo": '{"chosen": [messages], "rejected": [messages]}',
}


def detect(path: Path) -> Format:
    """The format of a file, from the keys of its first row.

    Raises UserError for a file that is empty, no JSON lines, or of no known kind.
    """
    for line, row in read_rows(path):
        for format_ in FORMATS:
            if format_.matches(row):
                return format_
        keys = ", ".join(sorted(map(str, row))) or "none"
        raise UserError(
            f"{path}, line {line}: no known kind of row (its keys: {keys}). "
            "Known: " + "; ".join(f"{kind} {text}" for kind, text in EXPECTED.items())
        )
    raise UserError(f"{path} is empty: it needs at least one JSON object on a line of its own")


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Line numbers (from 1) and objects of a JSON-lines file; blank lines are passed over."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if raw.strip():
                    yield number, _parse(path, number, raw)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def read_records(path: Path, kind: str) -> Iterator[Record]:
    """Every record of a file of the given kind, in order; raises UserError at the first bad row."""
    format_ = next(f for f in FORMATS if f.kind == kind)
    empty = True
    for line, row in read_rows(path):
        empty = False
        if not format_.matches(row):
            keys = ", ".join(sorted(map(str, row))) or "none"
            raise UserError(
                f"{path}, line {line}: not a {kind} row, which looks like {EXPECTED[kind]} "
                f"(its keys: {keys})"
            )
        try:
            value = format_.read(row)
        except ValueError as error:
            raise UserError(
                f"{path}, line {line}: {error}. Mend or remove the line; nothing was written."
            ) from error
        source = row.get("source")
        yield Record(value, source if isinstance(source, str) else "", path, line)
    if empty:
        raise UserError(f"{path} is empty: it needs rows like {EXPECTED[kind]}")


def _parse(path: Path, number: int, raw: bytes) -> Row:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {number}: not UTF-8 (byte {raw[error.start]:#04x} at {error.start}). "
            "Save the file as UTF-8."
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        start = raw[:60].decode("utf-8", "replace").strip()
        raise UserError(
            f"{path}, line {number}: not JSON ({reason}): {start!r}. "
            "Each line must hold one whole JSON object."
        ) from error
    if not isinstance(row, dict):
        raise UserError(
            f"{path}, line {number}: a JSON {type(row).__name__}, where an object is needed"
        )
    return row


def _check_unicode(text: str) -> None:
    """Raise ValueError for half of a surrogate pair, which has no UTF-8 and so no tokens."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} is half of a surrogate pair "
            f"({text[error.start]!r}), which no tokenizer can encode"
        ) from error
