"""The text of --help: every setting of a stage, by group, from the metadata of its field."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import get_type_hints

from trainlib.core.parsing import kind_text, parse, value_text
from trainlib.core.settings import HARDWARE_KEYS, Given, Key, keys, read_file

WIDTH = 79  # Some terminals of 80 columns wrap after the last one.
FLAGS = {
    "--help": "print this and end",
    "--prepare-only": "make the token caches and end",
    "--plan": "print memory and time of the run on each card, and end",
    "--gpu NAME[:N]": "plan for N of one card of configs/cards.tsv, in detail",
    "--budget TIME": "plan how many tokens a time holds: 45m, 2h, 1.5d",
}
"""Options of a stage's command line."""


def help_text(cls: type, script: str, stage: str, file: Path) -> str:
    """Return the usage, two examples, and every key with its default, type and meaning.

    `file` is the config file of the run; its values are shown next to the defaults.
    """
    values = read_file(file, [key.name for key in keys(cls)], []) or {}
    command = f"python {script}"
    lines = [
        f"usage: {command} [config.yaml] [section.key=value ...]",
        "       " + " ".join(f"[{flag}]" for flag in FLAGS),
        "",
        *_wrap(cls.__doc__ or "", ""),
        "",
        "examples:",
        f"  {command} configs/tiny_{stage}.yaml",
        f"  {command} data.files=mine.jsonl out_dir=runs/mine --prepare-only",
        "",
        "flags:",
        *(f"  {flag:16}{meaning}" for flag, meaning in FLAGS.items()),
        "",
        *_wrap(
            f"Settings, as key=default. Without a config file configs/{stage}.yaml counts; the "
            "command line is stronger than the environment, that than the file.",
            "",
        ),
    ]
    for title, members in groups(cls).items():
        lines += ["", f"{title}:"]
        for key in members:
            kind = kind_text(key.kind) + _override(key, values.get(key.name), file)
            lines += _wrap(f"{key.name}={value_text(key.default)}  ({kind})")
            lines += _wrap(key.doc, " " * 6)
    variables = [f"TRAIN_LLM_{name.upper()}" for name in HARDWARE_KEYS if hasattr(cls, name)]
    if variables:
        lines += ["", "environment:", *_wrap(", ".join(variables))]
    return "\n".join(lines) + "\n"


def groups(cls: type) -> dict[str, list[Key]]:
    """Return the settings by title: those in the class's GROUPS, other ones ("run"), sections."""
    titles = {name: title for title, names in getattr(cls, "GROUPS", {}).items() for name in names}
    grouped: dict[str, list[Key]] = {"run": [], **{title: [] for title in titles.values()}}
    hints, inherited = get_type_hints(cls), {}
    for key in keys(cls):
        section, dot, _ = key.name.partition(".")
        if dot:
            title = f"{section}: {(hints[section].__doc__ or '').splitlines()[0].rstrip('.')}"
            sections = grouped if section in cls.__annotations__ else inherited
            sections.setdefault(title, []).append(key)
        else:
            grouped[titles.get(key.name, "run")].append(key)
    # The sections of a stage come before those of its base class.
    return {title: members for title, members in {**grouped, **inherited}.items() if members}


def _override(key: Key, given: Given | None, file: Path) -> str:
    """Return the config file's value of a key if it is not the default."""
    if given is None:
        return ""
    try:
        same = parse(key.kind, given.value) == key.default
    except ValueError:
        same = False
    return "" if same else f"; {given.shown} in {file}"


def _wrap(text: str, indent: str = "  ") -> list[str]:
    """Return lines of at most WIDTH; those after the first line of a setting are indented more."""
    hanging = indent + "    " if indent == "  " else indent
    wrapper = textwrap.TextWrapper(WIDTH, indent, hanging)
    wrapper.break_on_hyphens = wrapper.break_long_words = False
    return wrapper.wrap(text)
