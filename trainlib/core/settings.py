"""Settings: frozen dataclasses filled from a YAML file, the environment and the command line.

Sections are dataclass fields of the stage's class. Precedence: command line, environment
(hardware keys only), YAML, default. Values are parsed according to the type of their field, never
by YAML's rules: in files and arguments, `1e-3` can be a number, `off` a boolean, `23:30` a string.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import operator
import os
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

import yaml

from trainlib.core.errors import UserError
from trainlib.core.parsing import parse, value_text

T = TypeVar("T")
HARDWARE_KEYS = ("device", "ranks", "micro_batch_size", "precision", "compile", "kernels")
"""Keys that the environment variables TRAIN_LLM_<KEY> may set."""
COMMAND_LINE = "command line"


class RawValue(NamedTuple):
    """An unparsed value, a string or a list of strings, and its source."""

    value: str | list[str]
    source: str

    @property
    def text(self) -> str:
        """The value as a single string."""
        return self.value if isinstance(self.value, str) else "[" + ", ".join(self.value) + "]"


@dataclass(frozen=True)
class Key:
    """One setting of a class: its dotted name, and the type, default and doc of its field."""

    name: str
    type: Any
    default: Any
    doc: str
    recipe: bool


# ---- 1. the settings of a class ------------------------------------------------------------------


def keys(cls: type) -> list[Key]:
    """Return the settings of a class and its sections, in order; all must have defaults."""
    return list(_walk(cls()))


def _walk(config: Any, prefix: str = "", recipe: bool = True) -> Iterator[Key]:
    """Yield the settings of a config and its sections, with the current values as defaults."""
    hints, docs_by_name = get_type_hints(type(config)), _attribute_docs(type(config))
    for field in fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        in_recipe = recipe and field.metadata.get("recipe", True)
        if is_dataclass(value):
            yield from _walk(value, name + ".", in_recipe)
        else:
            yield Key(name, hints[field.name], value, docs_by_name.get(field.name, ""), in_recipe)


@functools.cache
def _attribute_docs(cls: type) -> dict[str, str]:
    """Return the first paragraph of the docstring under each field, base classes included."""
    docs_by_name: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not is_dataclass(owner):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        body = tree.body[0].body  # type: ignore[attr-defined]
        for pair in zip(body, body[1:], strict=False):
            match pair:
                case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    first = inspect.cleandoc(text).split("\n\n")[0]
                    docs_by_name[name] = " ".join(first.split())
    return docs_by_name


# ---- 2. raw values -------------------------------------------------------------------------------


def read_file(path: Path, names: list[str], errors: list[str]) -> dict[str, RawValue] | None:
    """Return the values of a YAML file by dotted key, or None if unreadable; append to `errors`."""
    try:
        root = yaml.compose(path.read_bytes().decode("utf-8-sig"), yaml.BaseLoader)
    except OSError as error:
        hint = "pass another file as the first argument, such as configs/NAME.yaml"
        errors.append(f"{path}: cannot read the config file ({error.strerror}); {hint}")
        return None
    except UnicodeDecodeError as error:
        errors.append(f"{path}: not UTF-8 (byte {error.start}); convert it to UTF-8")
        return None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        errors.append(f"{path}{line}: not valid YAML: {problem}")
        return None
    if root is not None and not isinstance(root, yaml.MappingNode):
        errors.append(f"{path}:1: expected `key: value` lines")
        return {}
    values: dict[str, RawValue] = {}
    lines: dict[str, int] = {}
    for name, line, node in _entries(root, names):
        source = f"{path}:{line}"
        if not name:
            errors.append(f"{source}: expected `key: value`")
        elif name in lines:
            errors.append(f"{name} ({source}): set twice, first on line {lines[name]}; keep one")
        elif _is_section(name, names):
            if not isinstance(node, yaml.MappingNode) and node.value != "":
                errors.append(f"{name} ({source}): a section; expected `key: value` lines under it")
        elif name not in names:
            errors.append(f"{name} ({source}): {_unknown(name, names)}")
        elif isinstance(node, yaml.ScalarNode):
            values[name] = RawValue(node.value, source)
        elif isinstance(node, yaml.SequenceNode) and all(
            isinstance(item, yaml.ScalarNode) for item in node.value
        ):
            values[name] = RawValue([item.value for item in node.value], source)
        else:
            errors.append(f"{name} ({source}): expected a value or a list of values")
        lines.setdefault(name, line)
    return values


def _entries(node: yaml.MappingNode | None, names: list[str],
             prefix: str = "") -> Iterator[tuple[str, int, yaml.Node]]:  # fmt: skip
    """Yield key (empty if not a scalar), line and value of the entries, including sections'."""
    for key, value in node.value if node else ():
        name = prefix + key.value if isinstance(key, yaml.ScalarNode) else ""
        if name == "code":  # Not a setting: the code that made the run (engine/code.py).
            continue
        yield name, key.start_mark.line + 1, value
        if _is_section(name, names) and isinstance(value, yaml.MappingNode):
            yield from _entries(value, names, name + ".")


def _is_section(name: str, names: list[str]) -> bool:
    return any(known.startswith(name + ".") for known in names)


def _unknown(name: str, names: list[str]) -> str:
    if _is_section(name, names):
        return f"a section; set a key in it, such as {name}.KEY=value"
    last = name.rpartition(".")[2]
    if last in ("lr", "learning_rate"):
        rates = ", ".join(known for known in names if known.endswith("_lr"))
        return f"unknown key; the learning rates are {rates}"
    by_last = {known.rpartition(".")[2]: known for known in reversed(names)}
    near = [by_last[last]] if last in by_last else difflib.get_close_matches(name, names, 1)
    near = near or [by_last[match] for match in difflib.get_close_matches(last, by_last, 1)]
    return f"unknown key; did you mean {near[0]}?" if near else "unknown key; --help lists all keys"


def _read_arguments(argv: list[str], names: list[str],
                    errors: list[str]) -> tuple[Path | None, dict[str, RawValue]]:  # fmt: skip
    """Return the config file, if any, and the values by key; the last of duplicate keys wins."""
    file: Path | None = None
    values: dict[str, RawValue] = {}
    for argument in argv:
        name, equals, value = argument.partition("=")
        bare, error = name.lstrip("-").replace("-", "_"), ""
        if argument.endswith((".yaml", ".yml")) and (not equals or "/" in name):
            error = f"a second config file, after {file}; pass only one" if file else ""
            file = file or Path(argument)
        elif name.startswith("-") and bare in names:
            error = f"write it without dashes: {bare}={value or 'VALUE'}"
        elif value.startswith("[") and not value.endswith("]"):
            error = f'the list ends at a space; quote it, such as "{name}=[a, b]"'
        elif not equals:
            error = "expected a config file (.yaml) or section.key=value"
        elif name not in names:
            error = _unknown(bare, names)
        else:
            values[name] = RawValue(value, COMMAND_LINE)
        if error:
            errors.append(f"{argument} ({COMMAND_LINE}): {error}")
    return file, values


def _read_environment(names: list[str]) -> dict[str, RawValue]:
    variables = {name: f"TRAIN_LLM_{name.upper()}" for name in HARDWARE_KEYS if name in names}
    return {name: RawValue(os.environ[variable], f"environment {variable}")
            for name, variable in variables.items() if os.environ.get(variable)}  # fmt: skip


# ---- 3. a checked config -------------------------------------------------------------------------


def load_config(cls: type[T], argv: list[str], default_file: Path | None) -> T:
    """Return the settings of a command line; a single UserError lists all problems."""
    known = {key.name: key for key in keys(cls)}
    errors: list[str] = []
    named_file, arguments = _read_arguments(argv, list(known), errors)
    file = named_file or default_file
    in_file = read_file(file, list(known), errors) if file else {}
    values: dict[str, Any] = {}
    sources = dict.fromkeys(known, "default")
    length_keys = [known[name] for name in getattr(cls, "LENGTH_KEYS", ())]
    # Keys whose value is unknown: errors that mention one may follow from another error.
    failed = set(known) if in_file is None else set()
    for raw in (in_file or {}, _read_environment(list(known)), arguments):
        for name, value in raw.items():
            sources[name] = value.source
            try:
                values[name] = parse(known[name].type, value.value)
                failed.discard(name)
            except ValueError as error:
                errors.append(f"{name}={value.text} ({value.source}): expected {error}")
                failed.add(name)
        _keep_one_length(length_keys, set(raw) - failed, values, sources, errors)
    config = cls()
    for name, value in values.items():
        config = with_value(config, name, value, sources[name])
    errors += _config_errors(config, sources, failed)
    if errors:
        count = f"{len(errors)} problem{'s' if len(errors) > 1 else ''} in the settings:"
        raise UserError("\n  ".join([count, *(" ".join(text.split()) for text in errors)]))
    object.__setattr__(config, "_provenance", sources)
    return config


def _keep_one_length(length_keys: list[Key], names: set[str], values: dict[str, Any],
                     sources: dict[str, str], errors: list[str]) -> None:  # fmt: skip
    """If a source sets a length key, reset the others, so that it overrides earlier sources."""
    lengths = [key.name for key in length_keys if key.name in names and values[key.name]]
    if len(lengths) > 1:
        both = " and ".join(f"{name}={value_text(values[name])}" for name in lengths)
        origins = ", ".join(dict.fromkeys(sources[name] for name in lengths))
        errors.append(f"{both} ({origins}): a run has only one length; keep one")
    for key in length_keys:
        # An explicit zero such as `max_steps=0` is kept.
        if lengths and key.name != lengths[-1] and values.get(key.name, key.default):
            values[key.name], sources[key.name] = 0, f"replaced by {lengths[-1]}"


BOUNDS = {"above": ("above", operator.gt), "at_least": ("at least", operator.ge),
          "below": ("below", operator.lt), "at_most": ("at most", operator.le)}  # fmt: skip
"""Bounds in the metadata of a field: the wording for messages, and the comparison."""


def bound_errors(config: Any, prefix: str = "") -> list[str]:
    """Return one message for each value that is out of bounds, excluding sections."""
    errors = []
    for field in fields(config):
        value = getattr(config, field.name)
        bounds = [(*BOUNDS[key], field.metadata[key]) for key in BOUNDS if key in field.metadata]
        # A string such as "auto" has no bounds.
        if value != "auto" and not all(holds(value, limit) for _, holds, limit in bounds):
            allowed = " and ".join(f"{words} {limit}" for words, _, limit in bounds)
            errors.append(f"{prefix}{field.name}={value} must be {allowed}")
    return errors


def _config_errors(config: Any, sources: dict[str, str], failed: set[str],
                   prefix: str = "") -> list[str]:  # fmt: skip
    """Return the errors in a config and its sections, with the sources of the keys.

    Skips messages that mention a key in `failed`, which may follow from another error; adds to it.
    """
    errors: list[str] = []
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


# ---- 4. a loaded config --------------------------------------------------------------------------


def with_value(cfg: T, name: str, value: Any, source: str) -> T:
    """Return a copy of the settings with one dotted key changed, and record `source` for it."""
    head, _, rest = name.partition(".")
    inner = with_value(getattr(cfg, head), rest, value, source) if rest else value
    changed = dataclasses.replace(cfg, **{head: inner})  # type: ignore[type-var]
    object.__setattr__(changed, "_provenance", {**getattr(cfg, "_provenance", {}), name: source})
    return changed


def resolved(cfg: T, **values: Any) -> T:
    """Return a copy of the settings with each "auto" replaced by the value chosen for it."""
    for name, value in values.items():
        if value != getattr(cfg, name):
            cfg = with_value(cfg, name, value, "auto")
    return cfg


def provenance(cfg: Any) -> dict[str, str]:
    """Return the source of each value: file:line, command line, environment X, default."""
    recorded, defaults = getattr(cfg, "_provenance", {}), keys(type(cfg))
    return {key.name: recorded.get(key.name, "default" if key == default else "set by the program")
            for key, default in zip(_walk(cfg), defaults, strict=True)}  # fmt: skip


def recipe(cfg: Any) -> dict[str, Any]:
    """Return the settings that determine what the model learns (metadata "recipe") for JSON."""
    values = {key.name: key.default for key in _walk(cfg) if key.recipe}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def run_yaml(cfg: Any, change: Callable[[Any], Any] = lambda value: value) -> str:
    """Return the settings and their sources, changed by a function, as YAML for load_config."""
    lines, section, sources = [], "", provenance(cfg)
    # Keys without a section come first; after a section header they would belong to it.
    for key in sorted(_walk(cfg), key=lambda key: key.name.count(".")):
        head, _, last = key.name.rpartition(".")
        if head != section:
            lines.append(f"{head}:")
            section = head
        value, source = value_text(change(key.default)), change(sources[key.name])
        lines.append(f"{'  ' if head else ''}{last}: {value}  # {source}")
    return "\n".join(lines) + "\n"
