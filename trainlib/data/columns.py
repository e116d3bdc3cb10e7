"""Columns: which keys of a row hold its text, prompt, answer, messages and so on; role names.

columns.yaml lists our names and those of other projects. data.columns=[prompt:instruct] maps a
column that is not listed. Keys that nothing reads are counted (findings.py), except HARMLESS ones.
"""

import ast
import functools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import yaml

from tokenizer.chat_format import ROLES
from trainlib.data.containers import Row, are_messages, is_turn, load_json

NAMES = yaml.load(Path(__file__).with_suffix(".yaml").read_text("utf-8"), yaml.BaseLoader)
COLUMNS: dict[str, list[str]] = NAMES["columns"]
MAPPABLE = tuple(name for name in COLUMNS if name != "label")  # What data.columns may map.
ROLE_ALIASES, PAIR_ROLES = ({name: role for role, names in NAMES[section].items() for name in names}
                            for section in ("roles", "pair_roles"))  # fmt: skip
CALL_ROLES = ("function_call", "tool_call")
EMPTY_CELLS = ("", "nan", "none", "null")  # Empty cells of pandas and CSV writers, in lower case.
TURN_KEYS, HARMLESS = frozenset(NAMES["turn_keys"]), frozenset(NAMES["harmless"])
ASSISTANT_KEYS = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call")
"""Keys of a message that are read in an assistant's turn only."""
NAMES_OF_TURNS = frozenset(("messages", "prompt", "history", "answer", "chosen", "rejected"))
CHOICES = frozenset(("a", "b", "c", "d", "e", "options", "choices"))
"""Keys of multiple-choice rows. Without them a question is incomplete, however short they are."""
CONTENT_KEYS = ("content", "value", "text")  # Of a message. The first that is not empty is read.
ANSWERS_OF_TEXT = ("instruction", "question", "query", "q", "output", "response", "answer", "a")
"""Keys whose texts are never messages: JSON in them is what the model should read or write."""
MIN_WORDS, MIN_HAN = 3, 8
"""A text of an unread key is worth a warning from this many words or Chinese characters on."""


class Fields:
    """A row under our names: `keys` maps them to its keys; `read` has those that were asked for."""

    def __init__(self, row: Row, columns: tuple[str, ...] = ()) -> None:
        self.row, self._parsed, self.read = row, {}, set[str]()
        self.keys, ambiguous = _keys(tuple(row), columns)
        for name, candidates in ambiguous:
            full = (key for key in candidates if not _is_empty(row[key]))
            self.keys = {**self.keys, name: next(full, candidates[0])}
        if not self.has("prompt") and self.has("input"):
            self.keys = {**self.keys, "prompt": self.keys["input"]}
            del self.keys["input"]

    def get(self, name: str) -> Any:
        """Return the value under one of our names; None if it is missing, null or NaN."""
        self.read.add(name)
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
        """Return a value, parsed if it is a JSON or Python text, and conversations as messages."""
        if name not in self._parsed:
            value = self.get(name)
            found = parse_literal(value) if isinstance(value, str) else None
            value = _transposed(value if found is None else found)
            self._parsed[name] = _expanded(value) if name in ("messages", "history") else value
        return self._parsed[name]

    def turns(self, name: str) -> list[Any] | None:
        """Return a value that is a message or a list of messages, as a list; None for others."""
        value = self.parsed(name)
        value = [value] if is_turn(value) else value
        if not are_messages(value):
            return None
        # The JSON text of other objects is a text: an answer can be data with the key "from".
        if isinstance(self.get(name), str) and (
            self.keys[name].strip().lower() in ANSWERS_OF_TEXT
            or not all(role_of(turn) in (*ROLES, *CALL_ROLES) for turn in value)
        ):
            return None
        return value

    def unused(self) -> list[tuple[str, bool]]:
        """Return the unread keys of row and messages, and whether their texts are only there."""
        used = {self.keys[name] for name in self.read if name in self.keys}
        found = {key: [self.row[key]]
                 for key in _rest(tuple(self.row), HARMLESS)
                 if key not in used and not _is_empty(self.row[key])}  # fmt: skip
        for name in sorted(self.read & NAMES_OF_TURNS):
            for turn in self.turns(name) or ():
                unread = [*_rest(tuple(turn), TURN_KEYS)]
                unread += [key for key in CONTENT_KEYS if not _is_empty(turn.get(key))][1:]
                if role_of(turn) not in ("assistant", *CALL_ROLES):
                    unread += [key for key in ASSISTANT_KEYS if key in turn]
                for key in unread:
                    if not _is_empty(turn[key]):
                        found.setdefault(f"{self.keys[name]}[].{key}", []).append(turn[key])
        if not found:
            return []
        # A message holds its unread keys too, so identity separates these texts.
        unread = {id(text) for values in found.values() for text in _texts(values)}
        values = [self.parsed(name) for name in self.read if name in self.keys]
        texts = [t for t in _texts(values) if id(t) not in unread]
        choices = frozenset[str]() if "text" in self.read else CHOICES
        return [(key, _has_text(v, texts, not _rest((key,), choices))) for key, v in found.items()]


def role_of(turn: Row) -> Any:
    """Return the role of a message under our name; unchanged if it is unknown."""
    spelled = turn.get("from") if turn.get("role") is None else turn["role"]
    role = spelled.strip().lower() if isinstance(spelled, str) else spelled
    return ROLE_ALIASES.get(role, role) if isinstance(role, str) else role


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or value != value or value in ([], {})


@functools.lru_cache(4096)
def _keys(
    keys: tuple[str, ...], columns: tuple[str, ...]
) -> tuple[dict[str, str], list[tuple[str, list[str]]]]:
    """Return the key of a row for each of our names, and the names for which several may be it."""
    pairs = [entry.split(":", 1) for entry in columns]
    mapped = {theirs: ours for ours, theirs in pairs}
    by_name: dict[str, list[str]] = {}
    for key in keys:
        if key not in mapped:
            by_name.setdefault(str(key).strip().lower(), []).append(key)
    if "b" in by_name:
        by_name.pop("a", None)  # The first of several choices, not the answer.
    found = {}
    for name, others in COLUMNS.items():
        ours = [key for key in keys if mapped.get(key) == name]
        if candidates := ours or [key for other in others for key in by_name.get(other, ())]:
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
    for decode in (json.loads, _parse_python):
        try:
            value = load_json(text, decode)
            json.dumps(value)  # A Python literal can hold sets and other values that JSON lacks.
            return value
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return None


def _parse_python(text: str) -> Any:
    # numpy prints line breaks instead of commas between the objects of a list.
    text = re.sub(r"\}[ \t]*\n\s*\{", "}, {", text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # A text such as "\d" is no Python literal.
        return ast.literal_eval(text)


def _transposed(value: Any) -> Any:
    """Convert {"role": [...], "content": [...]} to a list of messages; return others unchanged."""
    if is_turn(value) and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) == 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return value


def _expanded(value: Any) -> Any:
    """Convert [{"human": ..., "assistant": ...}] and [question, answer] to a list of messages."""
    if not isinstance(value, list) or not value:
        return value
    if all(isinstance(text, str) for text in value):
        return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(value)]
    if not all(isinstance(p, dict) and p and PAIR_ROLES.keys() >= p.keys() for p in value):
        return value
    turns = [[{"role": PAIR_ROLES[key], "content": text} for key, text in pair.items()]
             for pair in value]  # fmt: skip
    # A struct of Parquet has its keys in any order.
    return [turn for pair in turns for turn in sorted(pair, key=lambda t: t["role"], reverse=True)]


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


def _has_text(value: Any, read: list[str], short: bool) -> bool:
    """Return whether a value holds a text, or a `short` one, that the texts that are read lack."""
    return any((short or _is_text(text)) and not any(
        text in other or len(other) > 0.2 * len(text) and other in text and _is_text(other)
        for other in read) for text in _texts(value))  # fmt: skip


def _is_text(text: str) -> bool:
    han = sum("\u4e00" <= c <= "\u9fff" for c in text)
    return len(text.split()) >= MIN_WORDS or han >= MIN_HAN


def suggest_columns(row: Row, kind: str | None) -> str:
    """Return a hint how to map the columns of a row whose format is unknown, or an empty string."""
    known, _ = _keys(tuple(row), ())
    wanted = {"pretrain": ("text",), "dpo": ("prompt", "chosen", "rejected")}
    names = wanted.get(kind or "", ("prompt", "answer"))
    used = {key for name, key in known.items() if name != "text" or name in names}
    keys = [k for k in row if isinstance(row[k], str) and not (k in used or _is_label(k, row[k]))]
    if not kind and len(keys) < 2:
        names = ("text",)
    names = [name for name in names if name not in known]
    if kind in (None, "sft"):
        lists = [key for key in row if key not in used and are_messages(_expanded(row[key]))]
        names, keys = (["messages"], lists) if lists else (names, keys)
    if not names or len(keys) < len(names):
        return ""
    if kind == "dpo" and "chosen" in names and len(keys) > len(names):
        return ". Name the columns with data.columns=[prompt:...,chosen:...,rejected:...]"
    example = ",".join(f"{name}:{key}" for name, key in zip(names, keys, strict=False))
    return (f'. If the columns have other names here, map them: "data.columns=[{example}]" '
            f"(the names on the left: {', '.join(MAPPABLE)})")  # fmt: skip


def _is_label(key: str, value: str) -> bool:
    """Return whether a column describes its row: an id, a number, or a key of HARMLESS."""
    name, value = str(key).strip().lower(), value.strip()
    if name in HARMLESS and name not in ("source", "title"):
        return True
    token = len(value) >= 16 and value.isascii() and not re.search(r"\s", value)
    return name.endswith(("id", "_name", "_source")) or token or value[:1].isdigit()
