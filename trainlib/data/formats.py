"""Row formats: convert accepted files to records (documents, conversations, preference pairs).

    Source (readers.py)   file -> items: JSON lines, array, CSV, text, Parquet; .gz and .zst
    detect                first rows -> format, and the reason for it
    check_items           items -> Record, or Broken with the reason

FORMATS lists all formats in the order in which they are tried. Reports group rows by the optional
key "source"; unknown keys are ignored. No row is skipped silently.
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
    """Options for rows that can be read in more than one way."""

    format: str = "auto"
    alpaca_join: str = "\n"


@dataclass(frozen=True)
class Record:
    """A checked row of a file; `value` is a text, a conversation, or (chosen, rejected)."""

    value: Any
    source: str
    path: Path
    line: int


@dataclass(frozen=True)
class Format:
    """A row format: how to recognize, read and check a row."""

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
    """The line that determined the format."""


UNPAIRED = "an unpaired preference (label or kto_tag), which no stage trains on"


def read_text(row: Row, options: ReadOptions) -> str:
    """Return the document of a pretraining row; raise ValueError if it is empty or not a string."""
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
    """Return whether row[key] is a list of turns, the first of which has the key `name`."""
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
STAGES = {"pretrain": "train.py", "sft": "sft_train.py", "dpo": "dpo_train.py"}
"""The script that trains on each kind of data, in the order in which the stages run."""
NAMES = ("auto", *(f.name for f in FORMATS), *CONTAINERS)
"""Values of data.format: a row format, or a container whose row format is then detected."""


def detect(path: Path, kind: str | None = None, name: str = "auto") -> Detection:
    """Detect the format of a file from its first rows, preferring formats of the given kind.

    `name` overrides the detection. Raises UserError if the file cannot be read or none of its
    first rows has a known format.
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
        matching = [f for f in FORMATS if f.matches(row)]
        if matching:
            format_ = next((f for f in matching if f.kind == kind), matching[0])
            compression = f" in {source.compression}" if source.compression else ""
            keys = ", ".join(map(str, row))
            reason = f"{source.container}{compression} ({source.reason}); line {item.line} has keys"
            return Detection(format_, source, f"{reason} {keys}", item.line)
        reason = reason or f"unknown row format (keys: {keys_of(row)})"
    if not reason:
        raise EmptyFileError(f"{path} is empty: it needs at least one row")
    if reason.startswith(NOT_UTF8):  # Every format requires UTF-8.
        raise UserError(f"{path}, line {line}: {reason}")
    raise UserError(f"{path}, line {line}: {reason}. Known formats:\n{known_formats()}")


def known_formats() -> str:
    """Return all row formats, one per line: name, stage and an example."""
    return "\n".join(
        f"  {f.name:<20} {f.kind if f.kind in EXAMPLES else 'no stage':<9} {f.example}"
        for f in FORMATS
    )


def check_items(
    items: Iterable[Item], path: Path, format_: Format, options: ReadOptions
) -> Iterator[tuple[int, Record | Broken]]:
    """Yield each item's line number with its record, or with the reason why it is broken."""
    others = [f for f in FORMATS if f.kind == format_.kind and f is not format_]
    if options.format == format_.name:
        others = []  # data.format allows only this one.
    for line, content in items:
        try:
            row = parse(content)
            matching = next((f for f in (format_, *others) if f.matches(row)), None)
            if matching is None:
                raise ValueError(
                    f"not {format_.kind} data such as {format_.example} (keys: {keys_of(row)})"
                )
            value = matching.read(row, options)
        except ValueError as error:
            yield line, Broken(str(error))
        else:
            source = row.get("source")
            yield line, Record(value, source if isinstance(source, str) else "", path, line)


def find_format(path: Path, kind: str, options: ReadOptions) -> Detection:
    """Return the format of a stage's data file; raise UserError if it is for another stage."""
    try:
        found = detect(path, kind, options.format)
    except EmptyFileError as error:
        raise EmptyFileError(f"{error} like {EXAMPLES[kind]}") from error
    if found.format.kind not in EXAMPLES:
        raise UserError(
            f"{path}, line {found.line}: {UNPAIRED}. Convert the rows to pairs: {EXAMPLES['dpo']}"
        )
    if found.format.kind != kind:
        raise UserError(
            f"{path}, line {found.line}: not {kind} data such as {EXAMPLES[kind]}, but "
            f"{found.format.kind} data ({found.format.name}: {found.reason}). Pass it to "
            f"{STAGES[found.format.kind]}."
        )
    return found


def broken_row(path: Path, line: int, reason: str) -> UserError:
    """Return the error for a broken row, with its file and line."""
    if GBK_FIX in reason:  # All other rows are broken too, so skipping does not help.
        return UserError(f"{path}, line {line}: {reason} (nothing was written)")
    return UserError(
        f"{path}, line {line}: {reason}. Fix or remove the line (nothing was written), or "
        "set data.on_error=skip to skip such rows."
    )


def keys_of(row: Row) -> str:
    """Return a row's keys as text for a message, truncated if long."""
    return ", ".join(sorted(map(str, row)))[:200] or "none"
