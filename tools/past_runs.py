"""Timings of past runs: minutes of training, and the speed of a stage's newest run."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from model import ModelConfig
from trainlib.core.files import ROOT
from trainlib.engine.metrics import TRAIN_SPEED, TRAIN_TOKENS, read_metrics
from trainlib.engine.run_folder import read_identity

RUNS = Path("runs")


def stage_settings(stage: str) -> dict[str, int]:
    """Return sequence_length and tokens_per_step from configs/<stage>.yaml."""
    path = ROOT / "configs" / f"{stage or 'pretrain'}.yaml"
    default = {"sequence_length": 512, "tokens_per_step": 131072}
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: int(config.get(key, value)) for key, value in default.items()}


def newest_speed(stage: str) -> tuple[float | None, str]:
    """Return the last speed (tokens/s) that a stage's newest run logged, and that run's folder.

    Only runs with a model of the default dimensions count, since steps are counted for it.
    """
    logs = [
        path
        for path in RUNS.rglob("metrics.jsonl")
        if read_identity(path.parent).get("stage", "") == stage and _has_default_size(path.parent)
    ]
    for log in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True):
        rows = read_metrics(log.parent)
        if speeds := [row[TRAIN_SPEED] for row in rows if TRAIN_SPEED in row]:
            return speeds[-1], str(log.parent)
    return None, ""


def _has_default_size(run: Path) -> bool:
    """Return whether the model of a run has the default width and depth."""
    for path in run.glob("*/config.json"):
        values, default = json.loads(path.read_text(encoding="utf-8")), ModelConfig()
        names = ("hidden_size", "num_hidden_layers", "intermediate_size")
        return all(values.get(name) == getattr(default, name) for name in names)
    return False


def minutes_trained(rows: list[dict[str, float]]) -> list[float]:
    """Return the training minutes up to each row, excluding startup, evaluation and checkpoints."""
    minutes, tokens, result = 0.0, 0.0, []
    for row in rows:
        if TRAIN_SPEED in row:
            minutes += (row[TRAIN_TOKENS] - tokens) / row[TRAIN_SPEED] / 60
            tokens = row[TRAIN_TOKENS]
        result.append(minutes)
    return result
