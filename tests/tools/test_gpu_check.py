"""Tests for make gpu-check: its table, and the tests in tests/cuda/ that also run on a CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools import gpu_check
from tools.gpu_check import CHECKS, Results, make_row

ROOT = Path(__file__).resolve().parents[2]


def report(outcome, when="call", longrepr=None, **properties):
    """Return a report like the ones that pytest creates for each phase of a test."""
    return SimpleNamespace(
        nodeid="tests/cuda/test_card_steps.py::test_speed", when=when, outcome=outcome,
        longrepr=longrepr, user_properties=list(properties.items()),
    )  # fmt: skip


def crash(message):
    return SimpleNamespace(reprcrash=SimpleNamespace(message=message))


PASSED = report("passed", check="logits in fp32", figure="off by 2.0e-06", limit="1e-03")
FAILED = report("failed", longrepr=crash("assert 2 < 1\n +  where"), check="loss", figure="+2%")
SKIPPED = report("skipped", "setup", ("file", 3, "Skipped: attention is varlen here"))


@pytest.mark.parametrize(
    "test_report, line",
    [
        (PASSED, "| logits in fp32 | OK | off by 2.0e-06 | 1e-03 |"),
        (FAILED, "| loss | FAILED | +2% (assert 2 < 1) |  |"),
        (SKIPPED, "| test_speed | skipped | attention is varlen here |  |"),
        (report("failed", "setup", "a | b"), "| test_speed | FAILED | (a / b) |  |"),
    ],
)
def test_each_test_report_becomes_a_row(test_report, line):
    assert make_row(test_report).line() == line


def test_results_pass_if_a_check_passes_and_none_fails():
    def passed(*reports):
        results = Results()
        for each in reports:
            results.pytest_runtest_logreport(each)
        return results.passed

    assert passed(PASSED, SKIPPED) and not passed(PASSED, FAILED)
    assert not passed() and not passed(SKIPPED)
    assert not passed(PASSED, report("failed", "teardown", "x"))
    assert not passed(report("passed", "setup")), "a test that never ran"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Return a function that runs the command with fake reports and returns the exit code."""

    def command(*arguments, reports=()):
        def tests(checks):
            results = Results()
            for each in reports:
                results.pytest_runtest_logreport(each)
            return results

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(gpu_check, "describe", lambda: "A card")
        monkeypatch.setattr(gpu_check, "run_tests", tests)
        monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
        monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments])
        with pytest.raises(SystemExit) as exit_:
            gpu_check.main()
        return int(exit_.value.code or 0)

    (tmp_path / "docs").mkdir()
    return command


def test_the_table_is_printed_and_written(run, tmp_path, capsys):
    assert run(reports=[PASSED, SKIPPED]) == 0
    written = (tmp_path / "docs/gpu.md").read_text()
    assert written.splitlines()[:4] == ["# A card", "", *gpu_check.TABLE]
    assert "| logits in fp32 | OK |" in written and written in capsys.readouterr().out + "\n"
    assert run(reports=[PASSED, FAILED]) == 1
    assert "FAILED" in (tmp_path / "docs/gpu.md").read_text()


def test_the_page_is_not_written_if_only_some_checks_run(run, tmp_path, capsys):
    assert run("model", reports=[PASSED]) == 0
    assert not (tmp_path / "docs/gpu.md").exists() and "| OK |" in capsys.readouterr().out
    assert run("modle") == 2
    assert "modle is not a check. Choose from attention, model" in capsys.readouterr().err


def test_a_file_without_a_table_is_not_replaced(run, tmp_path, capsys):
    (tmp_path / "docs/gpu.md").write_text("my notes")
    assert run(reports=[PASSED]) == 2
    assert "gpu.md already exists" in capsys.readouterr().err


def test_a_missing_gpu_or_pytest_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    with pytest.raises(SystemExit, match="no CUDA device, so nothing was checked"):
        gpu_check.main()
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(SystemExit, match="pip install -r requirements-dev.txt"):
        gpu_check.run_tests(["model"])


def test_every_check_has_tests():
    files = {path.stem.removeprefix("test_card_") for path in ROOT.glob("tests/cuda/test_*.py")}
    assert files == set(CHECKS)


@pytest.mark.slow
def test_cuda_tests_that_also_apply_to_a_cpu_pass_on_it():
    arguments = ["-q", "-m", "cuda", "-k", "not speed", "-p", "no:cacheprovider", "tests/cuda"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "CUDA_TESTS_DEVICE": "cpu"},
    )  # fmt: skip
    # One or two kernels, three model tests, one step test, three stages.
    assert re.search(r"\b[89] passed, [45] skipped", done.stdout), done.stdout + done.stderr
