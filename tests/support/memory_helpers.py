"""The shipped config files and their model dimensions, shared by several tests."""

from __future__ import annotations

import functools
from pathlib import Path

from tests.support.stages import STAGES
from trainlib.core.settings import load_config
from trainlib.engine.plan import CONFIGS, find_sizes

SHIPPED = sorted(CONFIGS.glob("*.yaml"))


def stage_of(path: Path) -> str:
    return path.stem.removeprefix("tiny_").partition("_")[0]


@functools.cache
def shipped(path: Path):
    """Return the settings of a config file, the model dimensions, and the positions per row."""
    stage = stage_of(path)
    config = load_config(STAGES[stage][2], [str(path)], None)
    return config, find_sizes(config)[0], config.sequence_length * (2 if stage == "dpo" else 1)
