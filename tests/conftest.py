"""Shared fixtures; every test runs with one thread and exact fp32."""

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
    """Reset model.ops to the formulas in model.py before each test."""
    vars(model.ops).update(vars(model.Ops()))
    yield


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Return the project's tokenizer."""
    return Tokenizer(default_folder())


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> None:
    """Change to an empty working folder with separate caches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def run_stage(monkeypatch) -> Iterator[Callable[..., int]]:
    """Yield a function that runs a stage in this process and returns its exit code."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(stage: str, *arguments: str) -> int:
        script, module, cls = STAGES[stage]
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        streams, hangup = (sys.stdout, sys.stderr), signal.getsignal(signal.SIGHUP)
        try:
            launch(cls, stage, module.prepare, module.main)
        except SystemExit as exit_:
            if isinstance(exit_.code, str):  # The interpreter prints it.
                print(exit_.code, file=sys.stderr)
            return 1 if isinstance(exit_.code, str) else int(exit_.code or 0)
        finally:
            sys.stdout, sys.stderr = streams
            signal.signal(signal.SIGHUP, hangup)
        return 0

    yield run
    root.handlers[:] = handlers  # The stage logs to a stream that the test closes.
    root.setLevel(level)
