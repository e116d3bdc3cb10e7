"""Generate the --help text, which lists every setting of a stage by group."""

import textwrap
from pathlib import Path
from typing import get_type_hints

from trainlib.core.parsing import parse, type_text, value_text
from trainlib.core.settings import HARDWARE_KEYS, Key, RawValue, keys, read_file

WIDTH = 79  # Some 80-column terminals wrap after the last column.
FLAGS = {"--help": "print this help and exit", "--prepare-only": "build the token caches and exit",
         "--verify-cache": "compare the digests of the token caches, then train",
         "--plan": "estimate the run's memory and time on each card, and exit",
         "--gpu NAME[:N]": "plan in detail for N cards of one type in configs/cards.tsv",
         "--budget TIME": "plan how many tokens fit in this time: 45m, 2h, 1.5d"}  # fmt: skip
"""Command-line options of a stage."""


def help_text(cls: type, script: str, stage: str, file: Path) -> str:
    """Return usage, examples, and every key with its default, type, doc, and value in `file`."""
    values = read_file(file, [key.name for key in keys(cls)], []) or {}
    command = f"python {script}"
    lines = [
        f"usage: {command} [config.yaml] [section.key=value ...]",
        *_wrap(" ".join(f"[{flag}]" for flag in FLAGS), " " * 7), "",
        *_wrap(cls.__doc__ or "", ""), "",
        "examples:", f"  {command} configs/tiny_{stage}.yaml",
        f"  {command} data.files=mine.jsonl out_dir=runs/mine --prepare-only", "",
        "flags:", *(f"  {flag:16}{text}" for flag, text in FLAGS.items()), "",
        *_wrap(f"Settings, as key=default. The default config file is configs/{stage}.yaml. The "
               "command line overrides the environment, which overrides the config file.", ""),
    ]  # fmt: skip
    for title, members in groups(cls).items():
        lines += ["", f"{title}:"]
        for key in members:
            expected = type_text(key.type) + _override(key, values.get(key.name), file)
            lines += _wrap(f"{key.name}={value_text(key.default)}  ({expected})")
            lines += _wrap(key.doc, " " * 6)
    variables = [f"TRAIN_LLM_{name.upper()}" for name in HARDWARE_KEYS if hasattr(cls, name)]
    if variables:
        lines += ["", "environment:", *_wrap(", ".join(variables))]
    return "\n".join(lines) + "\n"


def groups(cls: type) -> dict[str, list[Key]]:
    """Return the settings by title: "run" if they have no group, the groups, then the sections."""
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
    # Sections of a stage come before those of its base class.
    return {title: members for title, members in {**grouped, **inherited}.items() if members}


def _override(key: Key, raw: RawValue | None, file: Path) -> str:
    if raw is None:
        return ""
    try:
        same = parse(key.type, raw.value) == key.default
    except ValueError:
        same = False
    return "" if same else f"; {raw.text} in {file}"


def _wrap(text: str, indent: str = "  ") -> list[str]:
    """Wrap text to WIDTH columns; continuation lines of a setting are indented further."""
    hanging = indent + "    " if indent == "  " else indent
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=hanging,
                         break_on_hyphens=False, break_long_words=False)  # fmt: skip
