"""Texts to values and back: a setting is read by the type of its field, never by a guess."""

from __future__ import annotations

import math
import re
import types
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

SWITCHES = {"on": True, "true": True, "yes": True, "1": True}
SWITCHES |= {"off": False, "false": False, "no": False, "0": False}


def parse(kind: Any, value: str | list[str]) -> Any:
    """Read a text, or the texts of a list, as a type; a ValueError says what is expected."""
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        # None first and free text last, so that each text has one meaning.
        for option in sorted(options, key=lambda k: (k is str) - (k is types.NoneType)):
            try:
                return parse(option, value)
            except ValueError:
                continue
        raise ValueError(kind_text(kind))
    if origin is tuple:
        try:
            return tuple(parse(options[0], item) for item in _items(value))
        except ValueError:
            raise ValueError(kind_text(kind)) from None
    if isinstance(value, list):
        raise ValueError(f"{kind_text(kind)}, not a list")
    text = value.strip()
    if kind is types.NoneType:
        if text.lower() in ("", "none", "null", "~"):
            return None
    elif origin is Literal:
        for choice in options:
            if str(choice) == text:
                return choice
        spelling = {True: "on", False: "off"}.get(SWITCHES.get(text.lower()))  # type: ignore
        if spelling in options:
            return spelling
    elif kind is bool:
        if text.lower() in SWITCHES:
            return SWITCHES[text.lower()]
    elif kind in (int, float):
        return _number(kind, text)
    elif kind in (str, Path):
        return kind(value)
    else:
        raise TypeError(f"settings of type {kind} cannot be read")
    raise ValueError(kind_text(kind))


def _number(kind: type, text: str) -> int | float:
    try:
        number = Decimal(text)
        value = float(number)
    except (InvalidOperation, ValueError):
        raise ValueError(kind_text(kind)) from None
    # The bound comes first: as an int, 1e999999999 would fill the memory.
    whole = abs(value) < 2**63 and number == int(number)
    if not math.isfinite(value) or (kind is int and not whole):
        raise ValueError(kind_text(kind))
    return int(number) if kind is int else value


def _items(value: str | list[str]) -> list[str]:
    """The texts of a list: [a, b] or one text alone; nothing is the empty list."""
    if isinstance(value, list):
        return value
    text = value.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return [text] if text else []
    try:
        items = yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    if not all(isinstance(item, str) for item in items):
        raise ValueError("a list in a list")
    return items


def kind_text(kind: Any) -> str:
    """A type in words."""
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(kind_text(option) for option in options)
    if origin is tuple:
        return f"a list like [a, b], each {kind_text(options[0])}"
    if origin is Literal:
        return " or ".join(str(choice) for choice in options)
    names = {int: "a whole number", float: "a number", bool: "on or off", str: "a text"}
    return {**names, Path: "a path", types.NoneType: "none"}.get(kind, str(kind))


def value_text(value: Any) -> str:
    """A value as YAML, in the form that parse reads back."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(value_text(item) for item in value) + "]"
    text = repr(value) if isinstance(value, float) else str(value)
    if re.fullmatch(r"[\w./+-]+", text, re.ASCII):
        return text
    # Quoted on one line, with escapes for whatever YAML would fold.
    return yaml.dump(text, default_style='"', allow_unicode=True, width=10**9).rstrip("\n")
