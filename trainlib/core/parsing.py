"""Parse settings according to the types of their fields, and format values as YAML."""

import contextlib
import math
import re
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, Union, get_args, get_origin

import yaml

SWITCHES = {"on": True, "true": True, "yes": True, "1": True}
SWITCHES |= {"off": False, "false": False, "no": False, "0": False}


def parse(type_: Any, value: str | list[str]) -> Any:
    """Parse a string or list of strings as `type_`; raise ValueError that says what it must be."""
    origin, options = get_origin(type_), get_args(type_)
    if origin is tuple:
        try:
            return tuple(parse(options[0], item) for item in _items(value))
        except ValueError:
            raise ValueError(type_text(type_)) from None
    if isinstance(value, list):
        raise ValueError(f"{type_text(type_)}, not a list")
    if origin is Union:
        for option in options:
            with contextlib.suppress(ValueError):
                return parse(option, value)
        raise ValueError(type_text(type_))
    if type_ is str:
        return value
    text = value.strip()
    switch = SWITCHES.get(text.lower())
    if origin is Literal:
        # If on and off are choices, all spellings of a YAML boolean are accepted.
        spelling = {True: "on", False: "off", None: text}[switch]
        found = text if text in options else spelling if spelling in options else None
    elif type_ is bool:
        found = switch
    elif type_ in (int, float):
        found = _number(type_, text)
    else:
        raise TypeError(f"settings of type {type_} are not supported")
    if found is None:
        raise ValueError(type_text(type_))
    return found


def _number(type_: type, text: str) -> int | float | None:
    """Return a finite number, or None if the text is not a number of that type."""
    try:
        number = Decimal(text)
        value = float(number)
    except (InvalidOperation, ValueError):
        return None
    if type_ is float:
        return value if math.isfinite(value) else None
    # Check the bound first: as an int, 1e999999999 would exhaust memory.
    return int(number) if abs(value) < 2**63 and number == int(number) else None


def _items(value: str | list[str]) -> list[str]:
    """Return the items of a list: [a, b], or a single item; an empty string is an empty list."""
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
        raise ValueError("a flat list")
    return items


def type_text(type_: Any) -> str:
    """Return a description of a type."""
    origin, options = get_origin(type_), get_args(type_)
    if origin is tuple:
        return f"a list like [a, b], each item {type_text(options[0])}"
    if origin is Literal:
        return " or ".join(options)
    if origin is Union:
        return " or ".join(map(type_text, options))
    names = {int: "an integer", float: "a number", bool: "on or off", str: "a string"}
    return names.get(type_, str(type_))


def value_text(value: Any) -> str:
    """Format a value as YAML that `parse` can read."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(value_text(item) for item in value) + "]"
    text = repr(value) if isinstance(value, float) else str(value)
    if re.fullmatch(r"[\w./+-]+", text, re.ASCII):
        return text
    # Quoted on one line; characters that YAML would fold are escaped.
    return yaml.dump(text, default_style='"', allow_unicode=True, width=10**9).rstrip("\n")
