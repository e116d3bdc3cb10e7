"""Compare two runs: settings, data, code, versions, curves and weights.

    python -m tools.compare_runs A B

Prints what differs, and the first step at which the curves part. Curves are compared at the steps
that both runs logged, so the runs may be unfinished. `out_dir` and `resume` are not compared. The
exit code is 0 if nothing differs, 1 if something does, 2 if A or B is not a run.
"""

from __future__ import annotations

import trainlib.core.threads  # noqa: F401  # Before torch.

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from trainlib.core.errors import UserError
from trainlib.core.terminal import use_replacement_characters
from trainlib.engine.metrics import TRAIN_LOSS, VAL_LOSS, read_metrics
from trainlib.engine.run_folder import read_identity

NOT_COMPARED = ("out_dir", "resume")
"""Settings that say where a run is and how it was started."""


class Run:
    """What is compared of a run: its settings, identity, record of the code, and curves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "run.yaml"
        try:
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
            values = yaml.load(text, yaml.BaseLoader) or {}
            self.code: dict[str, Any] = values.pop("code", {})
            self.settings = dict(_flatten(values))
        except (ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
            problem = f"{path} cannot be read ({' '.join(str(error).split())})"
            raise UserError(
                f"{problem}. Copy run.yaml from one of the run's step folders."
            ) from error
        self.identity = read_identity(folder)
        self.rows = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
        self.steps = int(max((row["step"] for row in self.rows), default=0))

    def curve(self, name: str) -> dict[int, float]:
        """Return the values of a metric by step; NaN if it was not finite."""
        group = name.split("/")[0] + "/"
        logged = (row for row in self.rows if any(key.startswith(group) for key in row))
        return {int(row["step"]): row.get(name, math.nan) for row in logged}


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, ", ".join(value) if isinstance(value, list) else value or "empty"


def compare_settings(a: Run, b: Run) -> list[str]:
    """Return one line for each setting that differs."""
    names = [name for name in {**a.settings, **b.settings} if name not in NOT_COMPARED]
    pairs = {name: (a.settings.get(name, "-"), b.settings.get(name, "-")) for name in names}
    stages = a.identity.get("stage", ""), b.identity.get("stage", "")
    return [f"{name}: {x} / {y}" for name, (x, y) in {"stage": stages, **pairs}.items() if x != y]


def compare_data(a: Run, b: Run) -> list[str]:
    """Return what differs in the data and in the model that training starts from."""
    texts = {
        "data": "the data files or the tokenizer differ",
        "base": "the models in init_from differ",
    }
    pairs = [(a.identity.get(key), b.identity.get(key), text) for key, text in texts.items()]
    return [text for x, y, text in pairs if x != y]


def compare_code(a: Run, b: Run) -> list[str]:
    """Return the files of the code that differ, if both runs recorded them."""
    old, new = (run.code.get("files") or {} for run in (a, b))
    changed = sorted(path for path in {**old, **new} if old.get(path) != new.get(path))
    lines = [", ".join(changed)] if changed else []
    if not lines and a.code.get("digest") != b.code.get("digest"):
        lines = [f"{a.code.get('digest')} / {b.code.get('digest')}"]
    commits = [
        f"{run.code.get('commit')}{'' if run.code.get('clean') == 'true' else ' with changes'}"
        for run in (a, b)
    ]
    return [*lines, f"commits {' / '.join(commits)}"] if lines else []


def compare_versions(a: Run, b: Run) -> list[str]:
    """Return the versions of torch, if they differ."""
    x, y = a.code.get("torch"), b.code.get("torch")
    return [f"torch {x} / {y}"] if x != y else []


def compare_curves(a: Run, b: Run, name: str) -> tuple[list[str], str]:
    """Return the first step at which a curve differs, if any, and how much was compared."""
    old, new = a.curve(name), b.curve(name)
    common = sorted(old.keys() & new.keys())
    for number, step in enumerate(common):
        x, y = old[step], new[step]
        if x != y and not (math.isnan(x) and math.isnan(y)):
            after = f", after {number} equal ones" if number else ""
            return [f"the curves part at step {step}: {x:.6g} / {y:.6g}{after}"], ""
    if not common:
        return [], "no step that both runs logged"
    return [], f"equal at {len(common)} steps, the last is {common[-1]}"


def first_difference(a: Path, b: Path) -> tuple[str, float] | None:
    """Return the first tensor that differs in two safetensors files, and the largest difference.

    The difference is infinite if a tensor is missing or has another shape. None: all are equal.
    Raises UserError if a file cannot be read.
    """
    tensors = []
    for path in (a, b):
        try:
            tensors.append(load_file(path))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}). Train this run again.") from error
    old, new = tensors
    for name in {**old, **new}:
        x, y = old.get(name), new.get(name)
        if x is None or y is None or x.shape != y.shape:
            return name, math.inf
        if not torch.equal(x, y):
            return name, float((x.double() - y.double()).abs().max())
    return None


def compare_weights(a: Run, b: Run) -> tuple[list[str], str]:
    """Return the first tensor that differs in final/, if any, or why none was compared."""
    paths = [run.folder / "final/model.safetensors" for run in (a, b)]
    if missing := [str(path.parent) for path in paths if not path.is_file()]:
        return [], f"not compared (no {' and no '.join(missing)})"
    if difference := first_difference(*paths):
        name, largest = difference
        return [f"{name} differs by up to {largest:.3g}, possibly others too"], ""
    return [], "equal bit for bit"


def compare(a: Run, b: Run) -> bool:
    """Print what differs between two runs; return whether they are equal."""
    recorded = [run.code for run in (a, b)]
    older = [name for name, code in zip("AB", recorded, strict=True) if not code]
    unknown = f"not recorded in {' and '.join(older)} by an older version" if older else "equal"
    compared = all(recorded)
    parts: list[tuple[str, Callable[[], tuple[list[str], str]]]] = [
        ("settings", lambda: (compare_settings(a, b), "equal")),
        ("data", lambda: (compare_data(a, b), "equal")),
        ("code", lambda: (compare_code(a, b) if compared else [], unknown)),
        ("versions", lambda: (compare_versions(a, b) if compared else [], unknown)),
        (TRAIN_LOSS, lambda: compare_curves(a, b, TRAIN_LOSS)),
        (VAL_LOSS, lambda: compare_curves(a, b, VAL_LOSS)),
        ("weights", lambda: compare_weights(a, b)),
    ]
    print(f"A = {a.folder} ({a.steps} steps), B = {b.folder} ({b.steps} steps); values are A / B")
    equal = True
    for title, function in parts:
        differences, otherwise = function()
        equal = equal and not differences
        for index, line in enumerate(differences or [otherwise]):
            print(f"{title if not index else '':<12}{line}")
    print("equal" if equal else "different")
    return equal


def main() -> int:
    """Compare the two runs named on the command line; return the exit code."""
    use_replacement_characters()
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare_runs", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("a", metavar="A", type=Path, help="run folder, such as runs/pretrain")
    parser.add_argument("b", metavar="B", type=Path, help="run folder to compare it with")
    arguments = parser.parse_args()
    for folder in (arguments.a, arguments.b):
        if not any((folder / name).is_file() for name in ("run.yaml", "metrics.jsonl")):
            parser.error(f"{folder} is not a run: it has no run.yaml and no metrics.jsonl")
    try:
        return 0 if compare(Run(arguments.a), Run(arguments.b)) else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
