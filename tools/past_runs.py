"""What training takes here: a stage's settings, and the speed of the newest run of it."""

from __future__ import annotations

from pathlib import Path

import yaml

from trainlib.core.files import ROOT
from trainlib.engine.metrics import TRAIN_SPEED, read_metrics
from trainlib.engine.run_folder import stage_of

RUNS = Path("runs")


def stage_settings(kind: str) -> dict[str, int]:
    """sequence_length and tokens_per_step of configs/<stage>.yaml."""
    path = ROOT / "configs" / f"{kind or 'pretrain'}.yaml"
    default = {"sequence_length": 512, "tokens_per_step": 131072}
    given = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: int(given.get(key, value)) for key, value in default.items()}


def newest_speed(kind: str) -> tuple[float | None, str]:
    """Return the tokens per second of the newest run of a stage that has some, and its folder."""
    logs = [path for path in RUNS.rglob("metrics.jsonl") if stage_of(path.parent) == kind]
    for log in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True):
        rows = read_metrics(log.parent)
        if speeds := [row[TRAIN_SPEED] for row in rows if TRAIN_SPEED in row]:
            return speeds[-1], str(log.parent)
    return None, ""
