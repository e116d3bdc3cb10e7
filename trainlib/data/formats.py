"""Formats of rows: any accepted file to records (documents, conversations, preference pairs).

    Source (readers.py)   file -> items: JSON lines, array, CSV, text, Parquet; .gz and .zst
    detect                the format, by the first rows, and the reason
    check_items           items -> Record, or Broken with the reason

FORMATS lists all formats in the order in which they are tried. Reports count rows by their
"source", if they have one; other keys are ignored. No row is skipped silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from trainlib.core.errors import UserError
from trainlib.data import conversations as c
from trainlib.data.containers import GBK_FIX, NOT_UTF8, Broken, Item, Row
from trainlib.data.readers import CONTAINERS, EmptyFileError, Source, parse

DETECTION_ROWS = 50


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading rows whose content leaves a choice."""

    format: str = "auto"
    alpaca_join: str = "\n"


@dataclass(frozen=True)
class Record:
    """A checked row of a file: `value` is a text, a conversation, or (chosen, rejected)."""

    value: Any
    source: str
    path: Path
    line: int


@dataclass(frozen=True)
class Format:
    """A format of rows: how to recognise one, and how to read and check it."""

    name: str
    kind: str
    example: str
    matches: Callable[[Row], bool]
    read: Callable[[Row, ReadOptions], Any]


class Detection(NamedTuple):
    """The format of a file, and why it was chosen."""

    format: Format
    source: Source
    reason: str
    line: int = 1
    """The line that decided."""


UNPAIRED = "an unpaired preference (label or kto_tag), which no stage trains on"


def read_text(row: Row, options: ReadOptions) -> str:
    """Return the document of a pretraining row; raises ValueError if it is no text or empty."""
    text = c.check_text(row["text"], '"text"')
    if not text:
        raise ValueError('"text" is empty')
    return text


def _refuse(row: Row, options: ReadOptions) -> Any:
    raise ValueError(UNPAIRED)


def _has(row: Row, *keys: str) -> bool:
    return all(row.get(key) is not None for key in keys)


def _has_texts(row: Row, *keys: str) -> bool:
    return all(isinstance(row.get(key), str) for key in keys)


def _has_turns(row: Row, key: str, name: str) -> bool:
    """Return whether row[key] is a list of turns whose first one has the key `name`."""
    turns = row.get(key)
    return isinstance(turns, list) and (
        not turns or not isinstance(turns[0], dict) or name in turns[0]
    )


_ANSWERS = ("chosen", "rejected")
FORMATS: tuple[Format, ...] = (
    Format("sharegpt_preference", "dpo",
           '{"conversations": [...], "chosen": {"from", "value"}, "rejected": {"from", "value"}}',
           lambda r: _has(r, *_ANSWERS) and isinstance(r["chosen"], dict)
           and any(isinstance(r.get(k), list) for k in ("conversations", "messages")),
           lambda r, o: c.read_sharegpt_preference(r)),
    Format("preference", "dpo",
           '{"chosen": [messages], "rejected": [messages]}, with or without "prompt"',
           lambda r: _has(r, *_ANSWERS) and not isinstance(r["chosen"], str),
           lambda r, o: c.read_preference(r)),
    Format("alpaca_preference", "dpo",
           '{"instruction": "...", "input": "...", "chosen": "...", "rejected": "..."}',
           lambda r: _has_texts(r, *_ANSWERS) and "instruction" in r,
           lambda r, o: c.read_alpaca_preference(r, o.alpaca_join)),
    Format("prompt_preference", "dpo", '{"prompt": "...", "chosen": "...", "rejected": "..."}',
           lambda r: _has_texts(r, *_ANSWERS) and _has(r, "prompt"),
           lambda r, o: c.read_prompt_preference(r)),
    Format("text_preference", "dpo", '{"chosen": "...", "rejected": "..."}',
           lambda r: _has_texts(r, *_ANSWERS), lambda r, o: c.read_text_preference(r)),
    Format("unpaired", "kto", '{"prompt": "...", "completion": "...", "label": true}',
           lambda r: "kto_tag" in r or _has(r, "prompt", "completion") and "label" in r, _refuse),
    Format("openai", "sft", '{"messages": [{"role": "user", "content": "..."}, ...]}',
           lambda r: _has(r, "messages"), lambda r, o: c.read_chat(r, "messages")),
    Format("sharegpt", "sft", '{"conversations": [{"from": "human", "value": "..."}, ...]}',
           lambda r: _has_turns(r, "conversations", "from"),
           lambda r, o: c.read_chat(r, "conversations")),
    Format("minimind", "sft", '{"conversations": [{"role": "user", "content": "..."}, ...]}',
           lambda r: _has(r, "conversations"), lambda r, o: c.read_chat(r, "conversations")),
    Format("alpaca", "sft", '{"instruction": "...", "input": "...", "output": "..."}',
           lambda r: _has(r, "instruction") and (_has(r, "output") or _has(r, "response")),
           lambda r, o: c.read_alpaca(r, o.alpaca_join)),
    Format("prompt_completion", "sft", '{"prompt": "...", "completion": "..."}',
           lambda r: _has(r, "prompt", "completion"), lambda r, o: c.read_prompt_completion(r)),
    Format("question_answer", "sft", '{"q": "...", "a": "...", "history": [...]}',
           lambda r: _has(r, "q", "a"), lambda r, o: c.read_question_answer(r)),
    Format("text", "pretrain", '{"text": "..."}',
           lambda r: "text" in r, read_text),
)  # fmt: skip
EXAMPLES = {
    "pretrain": '{"text": "..."}',
    "sft": '{"conversations": [{"role": "user", "content": "..."}, ...]}',
    "dpo": '{"chosen": [messages], "rejected": [messages]}',
}
NAMES = ("auto", *(f.name for f in FORMATS), *CONTAINERS)
"""Values of data.format: a format of rows, or a container whose rows are then detected."""


def detect(path: Path, kind: str | None = None, name: str = "auto") -> Detection:
    """Return the format of a file by its first rows, preferably one of the given kind.

    `name` overrides the detection. Raises UserError for a file that cannot be read, or whose first
    rows are of no known format.
    """
    source = Source(path, name if name in CONTAINERS else "auto")
    for format_ in FORMATS:
        if format_.name == name:
            return Detection(format_, source, f"data.format={name}, in {source.container}")
    reason, line = "", 0
    for item in islice(source.items(), DETECTION_ROWS):
        line = line or item.line
        try:
            row = parse(item.content)
        except ValueError as error:
            reason = reason or str(error)
            continue
        fitting = [f for f in FORMATS if f.matches(row)]
        if fitting:
            format_ = next((f for f in fitting if f.kind == kind), fitting[0])
            compression = f" in {source.compression}" if source.compression else ""
            reason = f"{source.container}{compression} ({source.reason}); line {item.line} has "
            return Detection(format_, source, reason + ", ".join(map(str, row)), item.line)
        reason = reason or f"no known kind of row (its keys: {keys_of(row)})"
    if not reason:
        raise EmptyFileError(f"{path} is empty: it needs at least one row")
    if reason.startswith(NOT_UTF8):  # No other format would help.
        raise UserError(f"{path}, line {line}: {reason}")
    raise UserError(f"{path}, line {line}: {reason}. Known:\n{known_formats()}")


def known_formats() -> str:
    """Return all formats of rows, a line each: name, stage and an example."""
    return "\n".join(
        f"  {f.name:<20} {f.kind if f.kind in EXAMPLES else 'no stage':<9} {f.example}"
        for f in FORMATS
    )


def check_items(
    items: Iterable[Item], path: Path, format_: Format, options: ReadOptions
) -> Iterator[tuple[int, Record | Broken]]:
    """Yield the line of every item with its record, or with the reason why it is broken."""
    others = [f for f in FORMATS if f.kind == format_.kind and f is not format_]
    if options.format == format_.name:
        others = []  # The user has chosen the only format.
    for line, content in items:
        try:
            row = parse(content)
            fitting = next((f for f in (format_, *others) if f.matches(row)), None)
            if fitting is None:
                raise ValueError(
                    f"not a {format_.kind} row, which looks like {format_.example} "
                    f"(its keys: {keys_of(row)})"
                )
            value = fitting.read(row, options)
        except ValueError as error:
            yield line, Broken(str(error))
        else:
            source = row.get("source")
            yield line, Record(value, source if isinstance(source, str) else "", path, line)


def find_format(path: Path, kind: str, options: ReadOptions) -> Detection:
    """Return the format of a file that a stage reads; raises UserError for another kind."""
    try:
        found = detect(path, kind, options.format)
    except EmptyFileError as error:
        raise EmptyFileError(f"{error} like {EXAMPLES[kind]}") from error
    if found.format.kind not in EXAMPLES:
        raise UserError(
            f"{path}, line {found.line}: {UNPAIRED}. Preferences are learned from pairs: "
            f"{EXAMPLES['dpo']}"
        )
    if found.format.kind != kind:
        raise UserError(
            f"{path}, line {found.line}: not a {kind} row, which looks like {EXAMPLES[kind]}, but "
            f"{found.format.kind} ({found.format.name}: {found.reason})"
        )
    return found


def broken_row(path: Path, line: int, reason: str) -> UserError:
    """Return the error that names a broken row."""
    if GBK_FIX in reason:  # The other rows are as broken: skipping this one does not help.
        return UserError(f"{path}, line {line}: {reason} (nothing was written)")
    return UserError(
        f"{path}, line {line}: {reason}. Fix or remove the line (nothing was written), or "
        "leave such rows out with data.on_error=skip."
    )


def keys_of(row: Row) -> str:
    """Return the keys of a row, shortened for a message."""
    return ", ".join(sorted(map(str, row)))[:200] or "none"
