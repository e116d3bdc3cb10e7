"""What training takes here: a stage's settings, and the speed of the newest run of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import yaml

from trainlib.core.files import ROOT

RUNS = Path("runs")


def stage_settings(kind: str) -> dict[str, int]:
    """sequence_length and tokens_per_step of configs/<stage>.yaml."""
    path = ROOT / "configs" / f"{kind or 'pretrain'}.yaml"
    default = {"sequence_length": 512, "tokens_per_step": 131072}
    given = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: int(given.get(key, value)) for key, value in default.items()}


def newest_speed(kind: str) -> tuple[float | None, str]:
    """Tokens a second of the newest run of a stage that has measured some, and its folder."""
    logs = [path for path in RUNS.rglob("metrics.jsonl") if stage_of(path.parent) == kind]
    for log in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True):
        if speeds := list(_speeds(log)):
            return speeds[-1], str(log.parent)
    return None, ""


def stage_of(folder: Path) -> str:
    """The stage of a run, by what its run.yaml sets; empty where it has none."""
    try:
        settings = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    if not isinstance(settings, dict) or "data" not in settings:
        return ""
    # Only pretraining chooses the sizes of a model, and only DPO has a beta.
    return "pretrain" if "model" in settings else "dpo" if "beta" in settings else "sft"


def _speeds(log: Path) -> Iterator[float]:
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            speed = json.loads(line).get("train/tokens_per_second")
        except ValueError:  # A run that goes on may be writing the last line.
            continue
        if speed:
            yield float(speed)
