"""Row formats: convert accepted files to records (documents, conversations, preference pairs).

    Source (readers.py)   file -> items: JSON lines, array, CSV, text, Parquet; .gz and .zst
    detect                first rows -> format, and the reason for it
    check_items           items -> Record, Broken with the reason, or NotUsed

Each row is read for what it is, whatever the other rows of its file are. columns.py maps its keys
to our names. FORMATS lists all formats in the order in which they are tried. Reports group rows by
the optional key "source". No row is skipped silently.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tokenizer.bpe import SPECIAL_TOKENS
from trainlib.core.errors import UserError
from trainlib.data.columns import Fields, suggest_columns
from trainlib.data.containers import GBK_FIX, MAX_ROW_MB, NOT_UTF8, Broken, Item, Row
from trainlib.data.conversations import NotUsed, read_conversation, read_pair
from trainlib.data.findings import Counts
from trainlib.data.messages import check_text
from trainlib.data.readers import CONTAINERS, EmptyFileError, Source, parse

DETECTION_ROWS = 1000
MARKERS = re.compile(r"<\|im_start\|>|<\|im_end\|>|<\|endoftext\|>|<s>|</s>")
"""Markers between the texts of a pretraining row."""
CHAT = re.compile(r"<\|im_start\|>(?:system|user|assistant|tool)\n|\[INST\]")
"""Text of a chat template. Its turns belong together, so markers do not separate texts."""
TAGS = re.compile("<(?:" + "|".join(re.escape(tag[1:]) for tag in SPECIAL_TOKENS) + ")")
"""The text of special tokens."""


@dataclass(frozen=True)
class ReadOptions:
    """Options for rows that can be read in more than one way."""

    format: str = "auto"
    alpaca_join: str = "\n"
    columns: tuple[str, ...] = ()  # Entries of data.columns, such as prompt:instruct.
    split_markers: bool = True
    max_row_mb: int = MAX_ROW_MB


@dataclass(frozen=True)
class Record:
    """A checked row of a file; `value` is a text, a conversation, or (chosen, rejected)."""

    value: Any
    source: str
    path: Path
    line: int


@dataclass(frozen=True)
class Format:
    """A row format: its name, its stage, and how to recognize a row."""

    name: str
    kind: str
    example: str
    matches: Callable[[Fields], bool]


class Detection(NamedTuple):
    """The format of a file, and why it was chosen."""

    format: Format
    source: Source
    reason: str
    line: int = 1  # The line that determined the format.


UNPAIRED = "an unpaired preference (label or kto_tag), which no stage trains on"


def _called(f: Fields, name: str, key: str) -> bool:
    return f.has(name) and f.keys[name].strip().lower() == key


def _is_pair(f: Fields) -> bool:
    return f.has("rejected") and (f.has("chosen") or f.has("messages"))


def _is_sharegpt(f: Fields) -> bool:
    turns = f.parsed("messages")
    first = turns[0] if isinstance(turns, list) and turns else None
    return not isinstance(first, dict) or "from" in first


FORMATS: tuple[Format, ...] = (
    Format("sharegpt_preference", "dpo",
           '{"conversations": [...], "chosen": {"from", "value"}, "rejected": {"from", "value"}}',
           lambda f: _is_pair(f) and f.has("messages") and not f.has("prompt")),
    Format("preference", "dpo",
           '{"chosen": [messages], "rejected": [messages]}, with or without "prompt"',
           lambda f: _is_pair(f) and bool(f.turns("chosen") or f.turns("rejected"))),
    Format("alpaca_preference", "dpo",
           '{"instruction": "...", "input": "...", "chosen": "...", "rejected": "..."}',
           lambda f: _is_pair(f) and _called(f, "prompt", "instruction")),
    Format("prompt_preference", "dpo", '{"prompt": "...", "chosen": "...", "rejected": "..."}',
           lambda f: _is_pair(f) and f.has("prompt")),
    Format("text_preference", "dpo", '{"chosen": "...", "rejected": "..."}', _is_pair),
    Format("unpaired", "kto", '{"prompt": "...", "completion": "...", "label": true}',
           lambda f: _called(f, "label", "kto_tag") or f.has("prompt", "answer", "label")),
    Format("openai", "sft", '{"messages": [{"role": "user", "content": "..."}, ...]}',
           lambda f: _called(f, "messages", "messages") and not _is_pair(f)),
    Format("sharegpt", "sft", '{"conversations": [{"from": "human", "value": "..."}, ...]}',
           lambda f: f.has("messages") and _is_sharegpt(f) and not _is_pair(f)),
    Format("minimind", "sft", '{"conversations": [{"role": "user", "content": "..."}, ...]}',
           lambda f: f.has("messages") and not _is_pair(f)),
    Format("alpaca", "sft", '{"instruction": "...", "input": "...", "output": "..."}',
           lambda f: f.has("answer") and _called(f, "prompt", "instruction")),
    Format("prompt_completion", "sft", '{"prompt": "...", "completion": "..."}',
           lambda f: f.has("answer") and _called(f, "prompt", "prompt")),
    Format("question_answer", "sft", '{"question": "...", "answer": "...", "history": [...]}',
           lambda f: f.has("prompt", "answer")),
    Format("text", "pretrain", '{"text": "..."}', lambda f: "text" in f.keys),
)  # fmt: skip
EXAMPLES = {"pretrain": '{"text": "..."}',
            "sft": '{"conversations": [{"role": "user", "content": "..."}, ...]}',
            "dpo": '{"chosen": [messages], "rejected": [messages]}'}  # fmt: skip
STAGES = {"pretrain": "train.py", "sft": "sft_train.py", "dpo": "dpo_train.py"}
"""The script that trains on each kind of data, in the order in which the stages run."""
NAMES = ("auto", *(f.name for f in FORMATS), *CONTAINERS)
"""Values of data.format: a row format, or a container whose row format is then detected."""


def detect(path: Path, kind: str | None = None, name: str = "auto", columns: tuple[str, ...] = (),
           max_row_mb: int = MAX_ROW_MB) -> Detection:  # fmt: skip
    """Detect the format of a file from its first rows, preferring formats of the given kind.

    `name` overrides the detection. Raises UserError if no row can be read or has a known format.
    """
    source = Source(path, name if name in CONTAINERS else "auto", max_row_mb)
    for format_ in FORMATS:
        if format_.name == name:
            return Detection(format_, source, f"data.format={name}, in {source.container}")
    reason, line, other = "", 0, None
    for item in islice(source.items(), DETECTION_ROWS):
        line = line or item.line
        try:
            row = parse(item.content)
            fields = Fields(row, columns)
            if not (matching := [f for f in FORMATS if f.matches(fields)]):
                raise ValueError(f"unknown row format {keys_of(row, kind)}")
        except ValueError as error:
            reason = reason or str(error)
            continue
        found = next((f for f in matching if kind in (None, f.kind)), matching[0])
        compression = f" in {source.compression}" if source.compression else ""
        why = f"{source.container}{compression} ({source.reason}); line {item.line} has keys "
        detection = Detection(found, source, why + ", ".join(map(str, row)), item.line)
        if kind in (None, found.kind):
            return detection
        other = other or detection
    if other:
        return other
    if not reason:
        raise EmptyFileError(f"{path} is empty: it needs at least one row")
    if reason.startswith(NOT_UTF8):  # Every format requires UTF-8.
        raise UserError(f"{path}, line {line}: {reason}")
    raise UserError(f"{path}, line {line}: {reason}. Known formats:\n{known_formats()}")


def known_formats() -> str:
    """Return all row formats, one per line: name, stage and an example."""
    return "\n".join(f"  {f.name:<20} {f.kind if f.kind in EXAMPLES else 'no stage':<9} {f.example}"
                     for f in FORMATS)  # fmt: skip


def check_items(items: Iterable[Item], path: Path, kind: str, options: ReadOptions,
                counts: Counts) -> Iterator[tuple[int, list[Record] | Broken]]:  # fmt: skip
    """Yield each item's line number with its records, or with the reason why it is broken.

    A row with markers can be several records; an unused one is none. `counts` lacks broken rows.
    """
    counts.mapped = dict.fromkeys((entry.split(":", 1)[1] for entry in options.columns), 0)
    for line, content in items:
        try:
            row = parse(content)
            for column in counts.mapped:
                counts.mapped[column] += column in row
            values, fields = read_row(row, kind, options)
        except ValueError as error:
            yield line, Broken(str(error))
        except NotUsed as reason:
            counts.add_not_used(line, str(reason))
            yield line, []
        else:
            special = kind == "pretrain" and len(values) == 1 and bool(TAGS.search(values[0]))
            counts.add(line, fields.unused(), len(values), special)
            source = row.get("source")
            source = source if isinstance(source, str) else ""
            yield line, [Record(value, source, path, line) for value in values]


def read_row(row: Row, kind: str, options: ReadOptions) -> tuple[list, Fields]:
    """Return a row's values and fields; raise ValueError if it is broken, NotUsed if not used."""
    if kind not in EXAMPLES:
        raise ValueError(UNPAIRED)
    fields = Fields(row, options.columns)
    if not any(f.matches(fields) for f in _formats(kind, options.format)):
        empty = "answer" in fields.keys and not fields.has("answer")
        if kind == "sft" and fields.has("prompt") and empty:
            raise NotUsed(f"{fields.what('answer')} is empty")
        other = next((f for f in _formats("", options.format) if f.matches(fields)), None)
        if other:
            raise NotUsed(f"{other.kind} data, not {kind} data")
        raise ValueError(f"not {kind} data such as {EXAMPLES[kind]} {keys_of(row, kind)}")
    if kind == "pretrain":
        return read_documents(fields, options.split_markers), fields
    read = read_conversation if kind == "sft" else read_pair
    return [read(fields, options.alpaca_join)], fields


@functools.lru_cache
def _formats(kind: str, name: str) -> list[Format]:
    """Return the formats of a kind, or of all kinds; a `name` of a format excludes others."""
    named = any(f.name == name for f in FORMATS)
    found = [f for f in FORMATS if f.kind == kind or not kind]
    found = [f for f in found if not named or (f.name == name and kind)]
    # The widest format of a kind comes first: rows that it matches need no other test.
    return found[::-1] if kind else found


def read_documents(fields: Fields, split: bool = True) -> list[str]:
    """Return the documents of a pretraining row, split at markers if it is written with them."""
    value = fields.get("text")
    text = "" if value is None else check_text(value, fields.what("text"))
    documents = [text]
    first = MARKERS.search(text) if split and "<" in text and not CHAT.search(text) else None
    # <s> after a text is not a marker but struck-through text of an HTML page.
    if first and not (first[0] == "<s>" and text[: first.start()].strip()):
        pieces = MARKERS.split(text)
        # A single marker in the middle can be a text about markers, except <|endoftext|>.
        at_edge = not pieces[0].strip() or not pieces[-1].strip()
        if len(pieces) > 2 or (len(pieces) == 2 and (at_edge or "<|endoftext|>" in text)):
            documents = [piece.strip() for piece in pieces if piece.strip()]
    if not any(document.strip() for document in documents):
        raise NotUsed(f"{fields.what('text')} is empty")
    return documents


def find_format(path: Path, kind: str, options: ReadOptions) -> Detection:
    """Return the format of a stage's data file; raise UserError if it is for another stage."""
    try:
        found = detect(path, kind, options.format, options.columns, options.max_row_mb)
    except EmptyFileError as error:
        raise EmptyFileError(f"{error} like {EXAMPLES[kind]}") from error
    where = f"{path}, line {found.line}"
    if found.format.kind not in EXAMPLES:
        raise UserError(f"{where}: {UNPAIRED}. Convert the rows to pairs: {EXAMPLES['dpo']}")
    if found.format.kind != kind:
        raise UserError(f"{where}: not {kind} data such as {EXAMPLES[kind]}, but "
                        f"{found.format.kind} data ({found.format.name}: {found.reason}). Pass it "
                        f"to {STAGES[found.format.kind]}.")  # fmt: skip
    return found


def broken_row(path: Path, line: int, reason: str) -> UserError:
    """Return the error for a broken row, with its file and line."""
    fix, skip = ". Fix or remove the line", ", or set data.on_error=skip to skip such rows."
    if GBK_FIX in reason:  # All other rows are broken too, so skipping does not help.
        fix = skip = ""
    return UserError(f"{path}, line {line}: {reason}{fix} (nothing was written){skip}")


def keys_of(row: Row, kind: str | None) -> str:
    """Return a row's keys for a message, truncated if long, and a hint how to map them."""
    keys = ", ".join(sorted(map(str, row)))[:200] or "none"
    return f"(keys: {keys}){suggest_columns(row, kind)}"
