"""Columns: which keys of a row hold its text, prompt, answer, messages and so on.

COLUMNS lists our names and the names that other projects use. data.columns=[prompt:instruct] maps a
column that is not listed. Keys that nothing reads are counted (findings.py), except HARMLESS ones.
"""

from __future__ import annotations

import ast
import functools
import json
from typing import Any, NamedTuple

from trainlib.data.containers import Row, are_messages, is_turn

COLUMNS: dict[str, tuple[str, ...]] = {
    "text": ("text", "content"),
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog"),
    "prompt": ("prompt", "instruction", "question", "query", "q"),
    "input": ("input", "context"),
    "answer": ("output", "completion", "response", "answer", "a"),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "tools": ("tools", "functions"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "label": ("label", "kto_tag"),
}
"""Our name of a column, and its names in files, in lower case. The first that is not empty wins."""
MAPPABLE = tuple(name for name in COLUMNS if name != "label")
"""The names that data.columns may map."""
TURN_KEYS = frozenset((
    "role", "from", "content", "value", "text", "tool_calls", "function_call", "reasoning_content",
    "reasoning", "thinking", "enable_thinking", "tools", "functions", "weight", "train", "loss",
    "name", "tool_call_id", "id", "source", "score", "lang", "model", "timestamp", "metadata",
))  # fmt: skip
"""The keys of a message that are read, or that only repeat what another key says."""
HARMLESS = frozenset((
    "id", "idx", "index", "uid", "uuid", "_id", "row_id", "prompt_id", "question_id",
    "conversation_id", "source", "dataset", "subset", "split", "origin", "url", "link", "file",
    "path", "title", "author", "date", "time", "timestamp", "created", "created_at", "year",
    "score", "score_chosen", "score_rejected", "rating", "margin", "quality", "perplexity",
    "category", "categories", "topic", "task", "task_type", "type", "kind", "tag", "tags", "domain",
    "difficulty", "level", "lang", "language", "license", "meta", "metadata", "model", "hash",
    "md5", "sha256", "length", "len", "tokens", "num_tokens", "token_count", "num_turns", "turns",
    "images", "videos", "audios", "__index_level_0__", "gt", "reward",
))  # fmt: skip
"""Keys that describe a row; no stage reads them, and nothing is reported."""
MIN_WORDS, MIN_HAN = 3, 8
"""A text of an unread key is worth a warning from this many words or Chinese characters on."""


class Unused(NamedTuple):
    """A key that nothing reads, and whether it holds a text that is not also elsewhere."""

    key: str
    has_text: bool


class Fields:
    """A row under our names. `keys` maps each of our names to the key that holds it."""

    def __init__(self, row: Row, columns: tuple[str, ...] = ()) -> None:
        self.row, self._parsed = row, {}
        self.keys, ambiguous = _keys(tuple(row), columns)
        if ambiguous:
            self.keys = dict(self.keys)
        for name, candidates in ambiguous:
            full = (key for key in candidates if not _is_empty(row[key]))
            self.keys[name] = next(full, candidates[0])

    def get(self, name: str) -> Any:
        """Return the value under one of our names; None if it is missing, null or NaN."""
        value = self.row[self.keys[name]] if name in self.keys else None
        return None if isinstance(value, float) and value != value else value

    def has(self, *names: str) -> bool:
        """Return whether all these names have a value."""
        row, keys = self.row, self.keys
        for name in names:
            if name not in keys or (value := row[keys[name]]) is None or value != value:
                return False
        return True

    def what(self, name: str) -> str:
        """Return the key that holds `name`, quoted, for a message."""
        return f'"{self.keys.get(name, name)}"'

    def parsed(self, name: str) -> Any:
        """Return a value; if it is the text of a JSON or Python list or object, parse it."""
        if name not in self._parsed:
            value = self.get(name)
            found = parse_literal(value) if isinstance(value, str) else None
            self._parsed[name] = value if found is None else found
        return self._parsed[name]

    def turns(self, name: str) -> list[Any] | None:
        """Return a value that is a message or a list of messages, as a list; None for others."""
        value = self.parsed(name)
        value = [value] if is_turn(value) else value
        return value if are_messages(value) else None

    def unused(self, read: frozenset[str]) -> list[Unused]:
        """Return the keys of the row and of its messages that `read`, a set of our names, lacks."""
        used = {self.keys[name] for name in read if name in self.keys}
        found = {
            key: [self.row[key]]
            for key in _rest(tuple(self.row), HARMLESS)
            if key not in used and not _is_empty(self.row[key])
        }
        for name in read & {"messages", "prompt", "chosen", "rejected"}:
            for turn in self.turns(name) or ():
                for key in _rest(tuple(turn), TURN_KEYS):
                    if not _is_empty(turn[key]):
                        found.setdefault(f"{self.keys[name]}[].{key}", []).append(turn[key])
        if not found:
            return []
        # A message holds its unread keys too, so identity separates these texts.
        unread = {id(text) for values in found.values() for text in _texts(values)}
        values = [self.parsed(name) for name in read if name in self.keys]
        texts = [t for t in _texts(values) if id(t) not in unread]
        return [Unused(key, _has_text(values, texts)) for key, values in found.items()]


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or value != value or value in ([], {})


@functools.lru_cache(4096)
def _keys(
    keys: tuple[str, ...], columns: tuple[str, ...]
) -> tuple[dict[str, str], list[tuple[str, list[str]]]]:
    """Return the key of a row for each of our names, and the names for which several may be it."""
    pairs = [entry.split(":", 1) for entry in columns]
    mapped = {theirs: ours for ours, theirs in pairs}
    by_name: dict[str, str] = {}
    for key in keys:
        if key not in mapped:
            by_name.setdefault(str(key).strip().lower(), key)
    if "b" in by_name:
        by_name.pop("a", None)  # The first of several choices, not the answer.
    found = {}
    for name, others in COLUMNS.items():
        ours = [key for key in keys if mapped.get(key) == name]
        if candidates := ours or [by_name[other] for other in others if other in by_name]:
            found[name] = candidates
    if "prompt" not in found and "input" in found:
        found["prompt"] = found.pop("input")
    first = {name: candidates[0] for name, candidates in found.items()}
    return first, [(name, several) for name, several in found.items() if len(several) > 1]


@functools.lru_cache(4096)
def _rest(keys: tuple[str, ...], known: frozenset[str]) -> tuple[str, ...]:
    return tuple(key for key in keys if str(key).strip().lower() not in known)


def parse_literal(text: str) -> Any:
    """Return the list or object in a text, as JSON or as Python prints it; None for other texts."""
    text = text.strip()
    if text[:1] + text[-1:] not in ("[]", "{}"):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
            json.dumps(value)  # A Python literal can hold sets and other values that JSON lacks.
            return value
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return None


def _texts(value: Any) -> list[str]:
    """Return the strings in a value, in no particular order; values can be nested deeply."""
    todo, found = [value], []
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, (dict, list)):
            todo += value.values() if isinstance(value, dict) else value
    return found


def _has_text(value: Any, read: list[str]) -> bool:
    """Return whether a value holds a text of some length that the texts that are read lack."""
    return any(
        (len(text.split()) >= MIN_WORDS or sum("\u4e00" <= c <= "\u9fff" for c in text) >= MIN_HAN)
        and not any(
            text in other or len(other) > 0.2 * len(text) and other in text for other in read
        )
        for text in _texts(value)
    )


def suggest_columns(row: Row, kind: str | None) -> str:
    """Return a hint how to map the columns of a row whose format is unknown, or an empty string."""
    known, _ = _keys(tuple(row), ())
    wanted = {"pretrain": ("text",), "dpo": ("prompt", "chosen", "rejected")}
    keys = [key for key in _rest(tuple(row), HARMLESS)
            if isinstance(row[key], str) and key not in known.values()]  # fmt: skip
    names = wanted.get(kind or "", ("prompt", "answer") if len(keys) > 1 or kind else ("text",))
    names = [name for name in names if name not in known]
    if not names or len(keys) < len(names):
        return ""
    example = ",".join(f"{name}:{key}" for name, key in zip(names, keys, strict=False))
    return (
        f'. If the columns have other names here, map them: "data.columns=[{example}]" '
        f"(the names on the left: {', '.join(MAPPABLE)})"
    )
