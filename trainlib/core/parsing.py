"""Parse setting strings by the type of their field, and format values back to YAML."""

from __future__ import annotations

import math
import re
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, get_args, get_origin

import yaml

SWITCHES = {"on": True, "true": True, "yes": True, "1": True}
SWITCHES |= {"off": False, "false": False, "no": False, "0": False}


def parse(kind: Any, value: str | list[str]) -> Any:
    """Parse a text, or the texts of a list, as a type.

    Raises ValueError, whose text says what is expected.
    """
    origin, options = get_origin(kind), get_args(kind)
    if origin is tuple:
        try:
            return tuple(parse(options[0], item) for item in _items(value))
        except ValueError:
            raise ValueError(kind_text(kind)) from None
    if isinstance(value, list):
        raise ValueError(f"{kind_text(kind)}, not a list")
    if kind is str:
        return value
    text = value.strip()
    switch = SWITCHES.get(text.lower())
    if origin is Literal:
        # YAML's other words for on and off count where these two are choices.
        spelling = {True: "on", False: "off", None: text}[switch]
        found = text if text in options else spelling if spelling in options else None
    elif kind is bool:
        found = switch
    elif kind in (int, float):
        found = _number(kind, text)
    else:
        raise TypeError(f"settings of type {kind} cannot be read")
    if found is None:
        raise ValueError(kind_text(kind))
    return found


def _number(kind: type, text: str) -> int | float | None:
    """Return a finite number, whole for int; None if the text is none."""
    try:
        number = Decimal(text)
        value = float(number)
    except (InvalidOperation, ValueError):
        return None
    if kind is float:
        return value if math.isfinite(value) else None
    # The bound comes first: as an int, 1e999999999 would fill the memory.
    return int(number) if abs(value) < 2**63 and number == int(number) else None


def _items(value: str | list[str]) -> list[str]:
    """Return the texts of a list: [a, b], or one text alone; an empty text is the empty list."""
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
    """Return a type in words."""
    origin, options = get_origin(kind), get_args(kind)
    if origin is tuple:
        return f"a list like [a, b], each {kind_text(options[0])}"
    if origin is Literal:
        return " or ".join(options)
    names = {int: "a whole number", float: "a number", bool: "on or off", str: "a text"}
    return names.get(kind, str(kind))


def value_text(value: Any) -> str:
    """Return a value as YAML, in the form that parse reads back."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(value_text(item) for item in value) + "]"
    text = repr(value) if isinstance(value, float) else str(value)
    if re.fullmatch(r"[\w./+-]+", text, re.ASCII):
        return text
    # Quoted on one line, with escapes for whatever YAML would fold.
    return yaml.dump(text, default_style='"', allow_unicode=True, width=10**9).rstrip("\n")
