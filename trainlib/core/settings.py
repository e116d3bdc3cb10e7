"""Settings: frozen dataclasses filled from a YAML file, the environment and the command line.

Sections are dataclass fields of the stage's class. Precedence: command line, then environment
(hardware keys only), then YAML, then default. A value is read by the type of its field, never by
YAML's guess, so `1e-3` is a number, `off` a switch and `23:30` a text, wherever they are written.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import operator
import os
import re
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

import yaml

from trainlib.core.errors import UserError
from trainlib.core.files import write_atomically
from trainlib.core.parsing import parse, value_text

T = TypeVar("T")
HARDWARE_KEYS = ("device", "ranks", "micro_batch_size", "precision", "compile", "kernels")
"""What TRAIN_LLM_<KEY> in the environment may set."""
COMMAND_LINE = "command line"


class Given(NamedTuple):
    """A value as somebody wrote it: a text, or the texts of a list, and where it stands."""

    value: str | list[str]
    source: str

    @property
    def shown(self) -> str:
        """The value in one text."""
        return self.value if isinstance(self.value, str) else "[" + ", ".join(self.value) + "]"


@dataclass(frozen=True)
class Key:
    """One setting of a class: its dotted name and what its field says."""

    name: str
    kind: Any
    default: Any
    doc: str
    recipe: bool


# ---- 1. which settings a class has ---------------------------------------------------------------


def keys(cls: type) -> list[Key]:
    """Return all settings of a class and its sections, in the order of their definition.

    Every field must have a default.
    """
    return list(_walk(cls()))


def _walk(config: Any, prefix: str = "", recipe: bool = True) -> Iterator[Key]:
    """Yield the settings of a config and its sections, with their values as defaults."""
    hints, docs_by_name = get_type_hints(type(config)), _attribute_docs(type(config))
    for field in fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        learned = recipe and field.metadata.get("recipe", True)
        if is_dataclass(value):
            yield from _walk(value, name + ".", learned)
        else:
            yield Key(name, hints[field.name], value, docs_by_name.get(field.name, ""), learned)


def _attribute_docs(cls: type) -> dict[str, str]:
    """The first paragraph of the text literal under each field, base classes included."""
    docs_by_name: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not is_dataclass(owner):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = tree.body[0].body  # type: ignore[attr-defined]
        for statement, after in zip(body, body[1:], strict=False):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr)):
                continue
            text = getattr(after.value, "value", None)
            if isinstance(text, str):
                first = inspect.cleandoc(text).split("\n\n")[0]
                docs_by_name[statement.target.id] = " ".join(first.split())  # type: ignore
    return docs_by_name


# ---- 2. where values are given -------------------------------------------------------------------


def read_file(path: Path, names: list[str], problems: list[str]) -> dict[str, Given] | None:
    """Dotted keys of a YAML file; None where it cannot be read at all, with the reason noted."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        root = yaml.compose(text, yaml.BaseLoader)
    except OSError as error:
        cure = "name another as the first argument, like configs/NAME.yaml"
        problems.append(f"{path}: cannot read the config file ({error.strerror}); {cure}")
        return None
    except UnicodeDecodeError as error:
        problems.append(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8")
        return None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        problems.append(f"{path}{line}: not valid YAML: {problem}")
        return None
    given: dict[str, Given] = {}
    if isinstance(root, yaml.MappingNode):
        _read_mapping(root, "", path, names, given, problems)
    elif root is not None:
        problems.append(f"{path}:1: expected `key: value` lines")
    return given


def _read_mapping(
    node: yaml.MappingNode,
    prefix: str,
    path: Path,
    names: list[str],
    given: dict[str, Given],
    problems: list[str],
) -> None:
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        source = f"{path}:{line}"
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{source}: expected `key: value`")
            continue
        name = prefix + key_node.value
        is_section = any(known.startswith(name + ".") for known in names)
        if name in seen or name in given:
            first = seen.get(name) or given[name].source.rpartition(":")[2]
            problems.append(f"{name} ({source}): given twice, first in line {first}; keep one")
            continue
        seen[name] = line
        if is_section and isinstance(value_node, yaml.MappingNode):
            _read_mapping(value_node, name + ".", path, names, given, problems)
        elif is_section:
            if value_node.value != "":
                problems.append(f"{name} ({source}): a section; expected `key: value` lines in it")
        elif name not in names:
            problems.append(f"{name} ({source}): {_unknown(name, names)}")
        elif isinstance(value_node, yaml.ScalarNode):
            given[name] = Given(value_node.value, source)
        elif isinstance(value_node, yaml.SequenceNode) and all(
            isinstance(item, yaml.ScalarNode) for item in value_node.value
        ):
            given[name] = Given([item.value for item in value_node.value], source)
        else:
            problems.append(f"{name} ({source}): expected one value, or a list of values")


def _unknown(name: str, names: list[str]) -> str:
    if any(known.startswith(name + ".") for known in names):
        return f"a section; set a key in it, like {name}.KEY=value"
    last = name.rpartition(".")[2]
    by_last = {known.rpartition(".")[2]: known for known in reversed(names)}
    near = [by_last[last]] if last in by_last else difflib.get_close_matches(name, names, 1)
    near = near or [by_last[match] for match in difflib.get_close_matches(last, by_last, 1)]
    return f"unknown key; did you mean {near[0]}?" if near else "unknown key; --help lists all"


def _read_arguments(
    argv: list[str], names: list[str], problems: list[str]
) -> tuple[Path | None, dict[str, Given]]:
    """The config file, if one is named, and the keys of the command line; the last one counts."""
    file: Path | None = None
    given: dict[str, Given] = {}
    for argument in argv:
        name, equals, value = argument.partition("=")
        if argument.endswith((".yaml", ".yml")) and (not equals or "/" in name):
            if file:
                problems.append(f"{argument} ({COMMAND_LINE}): a second config file after {file}")
            file = file or Path(argument)
        elif (bare := name.lstrip("-").replace("-", "_")) in names and name.startswith("-"):
            cure = f"write it without dashes: {bare}={value or 'VALUE'}"
            problems.append(f"{argument} ({COMMAND_LINE}): {cure}")
        elif not equals:
            expected = "expected a config file (.yaml) or section.key=value"
            problems.append(f"{argument} ({COMMAND_LINE}): {expected}")
        elif name not in names:
            problems.append(f"{argument} ({COMMAND_LINE}): {_unknown(name, names)}")
        else:
            given[name] = Given(value, COMMAND_LINE)
    return file, given


def _read_environment(names: list[str]) -> dict[str, Given]:
    given = {}
    for name in names:
        variable = f"TRAIN_LLM_{name.rpartition('.')[2].upper()}"
        if name.rpartition(".")[2] in HARDWARE_KEYS and os.environ.get(variable):
            given[name] = Given(os.environ[variable], f"environment {variable}")
    return given


# ---- 3. all together -----------------------------------------------------------------------------


def load_config(cls: type[T], argv: list[str], default_file: Path | None) -> T:
    """The settings of a run from `[config.yaml] [section.key=value ...]`.

    Raises UserError with every problem at once: key, value, where it stands, what is expected.
    """
    known = {key.name: key for key in keys(cls)}
    problems: list[str] = []
    named_file, arguments = _read_arguments(argv, list(known), problems)
    file = named_file or default_file
    in_file = read_file(file, list(known), problems) if file else {}
    values: dict[str, Any] = {}
    sources = {name: "default" for name in known}
    # Keys whose value is not known: what is said of them may follow from another problem.
    failed = set(known) if in_file is None else set()
    for given in (in_file or {}, _read_environment(list(known)), arguments):
        lengths = []
        for name, value in given.items():
            sources[name] = value.source
            try:
                values[name] = parse(known[name].kind, value.value)
            except ValueError as error:
                problems.append(f"{name}={value.shown} ({value.source}): expected {error}")
                failed.add(name)
                continue
            failed.discard(name)
            if name in getattr(cls, "LENGTH_KEYS", ()) and values[name]:
                lengths.append(name)
        _settle_length(cls, known, lengths, values, sources, problems)
    config = _replace_values(cls(), values)
    problems += _config_errors(config, sources, failed)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the settings:"
        raise UserError("\n  ".join([count, *(" ".join(text.split()) for text in problems)]))
    object.__setattr__(config, "_provenance", sources)
    return config


def _settle_length(
    cls: type,
    known: dict[str, Key],
    lengths: list[str],
    values: dict[str, Any],
    sources: dict[str, str],
    problems: list[str],
) -> None:
    """One length a source; it replaces those of the weaker sources, the defaults included."""
    if len(lengths) > 1:
        both = " and ".join(f"{name}={value_text(values[name])}" for name in lengths)
        places = ", ".join(dict.fromkeys(sources[name] for name in lengths))
        problems.append(f"{both} ({places}): two lengths of one run; keep one")
        lengths = lengths[-1:]  # As if that one were kept, so that nothing else is said of it.
    if lengths:
        for name in set(getattr(cls, "LENGTH_KEYS", ())) & set(known) - set(lengths):
            # `max_steps=0` beside the new length was said by the same source: it keeps its place.
            if values.get(name, known[name].default):
                values[name] = None if types.NoneType in get_args(known[name].kind) else 0
                sources[name] = f"replaced by {lengths[0]}"


def _replace_values(config: T, values: dict[str, Any], prefix: str = "") -> T:
    """Return a config with the given values, by dotted key, in it and in its sections."""
    changes = {}
    for field in fields(config):  # type: ignore[arg-type]
        name, value = prefix + field.name, getattr(config, field.name)
        if is_dataclass(value):
            changes[field.name] = _replace_values(value, values, name + ".")
        else:
            changes[field.name] = values.get(name, value)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


BOUNDS = {
    "above": ("above", operator.gt),
    "at_least": ("at least", operator.ge),
    "below": ("below", operator.lt),
    "at_most": ("at most", operator.le),
}
"""Bounds that the metadata of a field may hold: their words, and what a value must fulfil."""


def bound_errors(config: Any, prefix: str = "") -> list[str]:
    """Return one message for each value that its field's bounds do not allow, sections excluded."""
    errors = []
    for field in fields(config):
        value = getattr(config, field.name)
        bounds = [(*BOUNDS[key], field.metadata[key]) for key in BOUNDS if key in field.metadata]
        if not all(holds(value, limit) for _, holds, limit in bounds):
            allowed = " and ".join(f"{words} {limit}" for words, _, limit in bounds)
            errors.append(f"{prefix}{field.name}={value} must be {allowed}")
    return errors


def _config_errors(
    config: Any, sources: dict[str, str], failed: set[str], prefix: str = ""
) -> list[str]:
    """Return what is wrong with a config and its sections, with the sources of the keys.

    Messages that mention a key of `failed` are skipped: they may follow from another problem. The
    keys of a section with errors are added to it.
    """
    errors = []
    for field in fields(config):
        section = getattr(config, field.name)
        if is_dataclass(section):
            errors += _config_errors(section, sources, failed, f"{prefix}{field.name}.")
    own = bound_errors(config, prefix) + getattr(config, "validation_errors", list)()
    for text in own:
        mentioned = [word for word in re.findall(r"[\w.]+\w", text) if word in sources]
        if not failed.intersection(mentioned):
            origins = ", ".join(f"{name}: {sources[name]}" for name in dict.fromkeys(mentioned))
            errors.append(f"{text} ({origins})" if origins else text)
    if own:
        failed |= {name for name in sources if name.startswith(prefix)}
    return errors


# ---- 4. what others read of it -------------------------------------------------------------------


def with_value(cfg: T, name: str, value: Any, source: str) -> T:
    """The settings with one dotted key set by the program, and why: what provenance tells of it."""
    head, _, rest = name.partition(".")
    inner = with_value(getattr(cfg, head), rest, value, source) if rest else value
    changed = dataclasses.replace(cfg, **{head: inner})  # type: ignore[type-var]
    object.__setattr__(changed, "_provenance", {**getattr(cfg, "_provenance", {}), name: source})
    return changed


def provenance(cfg: Any) -> dict[str, str]:
    """Where each value came from: file:line, command line, environment X, default."""
    noted, defaults = getattr(cfg, "_provenance", {}), keys(type(cfg))
    return {
        key.name: noted.get(key.name, "default" if key == default else "set by the program")
        for key, default in zip(_walk(cfg), defaults, strict=True)
    }


def recipe(cfg: Any) -> dict[str, Any]:
    """Flat dotted keys of what decides what is learned, in values that JSON keeps.

    A field whose metadata says {"recipe": False} is left out, with all of its section.
    """
    plain = {key.name: key.default for key in _walk(cfg) if key.recipe}
    return {
        name: list(value)
        if isinstance(value, tuple)
        else str(value)
        if isinstance(value, Path)
        else value
        for name, value in plain.items()
    }


def resolved(cfg: T, **values: Any) -> T:
    """The settings with what "auto" turned into in its place; its source says so."""
    for name, value in values.items():
        if value != getattr(cfg, name):
            cfg = with_value(cfg, name, value, "auto")
    return cfg


def write_run_yaml(cfg: Any, path: Path) -> None:
    """The resolved settings as YAML that load_config reads again, each with its source."""
    lines, section, sources = [], "", provenance(cfg)
    # Keys without a section first: those after one would belong to it.
    for key in sorted(_walk(cfg), key=lambda key: "." in key.name):
        head, _, last = key.name.rpartition(".")
        if head != section:
            lines += _section_lines(section, head)
            section = head
        indent = "  " * key.name.count(".")
        lines.append(f"{indent}{last}: {value_text(key.default)}  # {sources[key.name]}")
    write_atomically(path, "\n".join(lines) + "\n")


def _section_lines(before: str, after: str) -> list[str]:
    old, new = before.split("."), after.split(".")
    shared = 0
    while shared < min(len(old), len(new)) and old[shared] == new[shared]:
        shared += 1
    return ["  " * depth + new[depth] + ":" for depth in range(shared, len(new))]
