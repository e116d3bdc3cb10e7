"""One thread and exact fp32 for every test; a stage's command line in this process."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

import model
from tests.support.stages import STAGES
from tokenizer.bpe import Tokenizer, default_folder
from trainlib.engine.launch import launch

torch.set_num_threads(1)
torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def plain_ops() -> Iterator[None]:
    """Every test begins with the formulas of model.py, whatever kernels the one before chose."""
    vars(model.ops).update(vars(model.Ops()))
    yield


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The project's own tokenizer."""
    return Tokenizer(default_folder())


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> None:
    """An empty folder to work in, with caches of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def run_stage(monkeypatch) -> Iterator[Callable[..., int]]:
    """Run a stage's command line in this process; gives its exit code."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(stage: str, *words: str) -> int:
        script, module, cls = STAGES[stage]
        monkeypatch.setattr(sys, "argv", [script, *words])
        streams, hangup = (sys.stdout, sys.stderr), signal.getsignal(signal.SIGHUP)
        try:
            launch(cls, stage, module.prepare, module.main)
        except SystemExit as exit_:
            return int(exit_.code or 0)
        finally:
            sys.stdout, sys.stderr = streams
            signal.signal(signal.SIGHUP, hangup)
        return 0

    yield run
    root.handlers[:] = handlers  # The stage's own writes to an output that ends with the test.
    root.setLevel(level)
