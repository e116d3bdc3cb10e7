"""Checks the correctness and speed of training on this machine's GPU in a few minutes.

    python -m tools.gpu_check [--out docs/gpu.md] [CHECK ...]

    attention   each kernel compared with fp64 arithmetic, forward and backward, on packed documents
    model       fp32 logits and gradients compared with the CPU, 16-bit loss compared with fp32
    steps       training compiles once; forward and backward never synchronize; peak memory is as
                predicted; tokens per second with and without compilation
    stages      a few steps of each stage; the first stage is killed and resumed

Runs the tests marked `cuda` in tests/cuda/ and prints a table of their results. The exit code is 1
if a check fails or there is no GPU. If all checks run, the table is written to docs/gpu.md.
"""

from __future__ import annotations

import trainlib.core.threads  # noqa: F401  # Before torch.

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tools.outputs import refuse_to_overwrite
from trainlib.core.errors import UserError
from trainlib.core.files import ROOT
from trainlib.core.terminal import use_replacement_characters

CHECKS = ("attention", "model", "steps", "stages")
LABELS = {"passed": "OK", "failed": "FAILED", "skipped": "skipped"}
TABLE = ("| check | result | figure | limit |", "| --- | --- | --- | --- |")


class Row(NamedTuple):
    """One row of the results table."""

    check: str
    result: str
    figure: str
    limit: str

    def line(self) -> str:
        """Return the row in Markdown; "|" is replaced, as it would end a cell."""
        return f"| {' | '.join(cell.replace('|', '/') for cell in self)} |"


class Results:
    """Pytest plugin that collects one row per test."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Add a row if a test ran, or if its setup or teardown did not pass."""
        if report.when == "call" or report.outcome != "passed":
            self.rows.append(make_row(report))

    @property
    def passed(self) -> bool:
        """Return whether at least one check passed and none failed."""
        results = {row.result for row in self.rows}
        return LABELS["passed"] in results and LABELS["failed"] not in results


def make_row(report: Any) -> Row:
    """Return the table row for a test report, using the properties that the test recorded."""
    properties = dict(report.user_properties)
    figure = properties.get("figure", "")
    if report.outcome == "skipped":
        figure = report.longrepr[2].removeprefix("Skipped: ")
    elif report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = (str(crash.message if crash else report.longrepr).strip() or "?").splitlines()[0]
        figure = f"{figure} ({reason[:150]})".strip()
    check = properties.get("check", report.nodeid.rpartition("::")[2])
    return Row(check, LABELS[report.outcome], figure, properties.get("limit", ""))


def describe() -> str:
    """Return the GPU's name, memory and compute capability, software versions and the date."""
    card = torch.cuda.get_device_properties(0)
    size = f"{card.total_memory / 2**30:.0f} GiB, capability {card.major}.{card.minor}"
    versions = f"CUDA {torch.version.cuda}, torch {torch.__version__}"
    return f"{card.name}, {size}, {versions}, {time.strftime('%Y-%m-%d')}"


def run_tests(checks: list[str]) -> Results:
    """Run the tests for the named checks; pytest prints the failures."""
    try:
        import pytest
    except ImportError:
        sys.exit("error: gpu_check needs pytest. Run `pip install -r requirements-dev.txt`.")
    results = Results()
    files = [str(ROOT / f"tests/cuda/test_card_{check}.py") for check in checks]
    options = ["-q", "--no-header", "--tb=short", "-m", "cuda", f"--rootdir={ROOT}"]
    pytest.main([*options, *files], plugins=[results])
    return results


def main() -> None:
    """Run the named checks, or all of them, and print the table."""
    use_replacement_characters()
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"any of {', '.join(CHECKS)}")
    parser.add_argument("--out", type=Path, help="output file (with all checks: docs/gpu.md)")
    options = parser.parse_args()
    for check in options.checks:
        if check not in CHECKS:
            parser.error(f"{check} is not a check. Choose from {', '.join(CHECKS)}.")
    if not torch.cuda.is_available():
        sys.exit(
            "error: torch found no CUDA device, so nothing was checked. See the Training section "
            "of docs/troubleshooting.md."
        )
    out = options.out or (None if options.checks else ROOT / "docs/gpu.md")
    if out:
        try:
            refuse_to_overwrite(out, TABLE[0])
        except UserError as error:
            parser.error(str(error))
    results = run_tests(options.checks or list(CHECKS))
    lines = [f"# {describe()}", "", *TABLE, *(row.line() for row in results.rows)]
    print("\n".join(["", *lines]))
    if out:
        out.write_text("\n".join([*lines, ""]), encoding="utf-8")
        print(f"\nwrote {out}")
    sys.exit(not results.passed)


if __name__ == "__main__":
    main()
