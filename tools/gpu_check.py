"""Is training right on this machine's card, and how fast? A few minutes, one table.

    python -m tools.gpu_check [--out docs/gpu.md] [CHECK ...]

    attention   each kernel against fp64 arithmetic, forward and backward, on packed documents
    model       logits and gradient in fp32 against the CPU's, loss in 16 bits against fp32
    steps       training compiles once, forward and backward wait for nothing, the predicted peak of
                a step against the allocator's, tokens a second with and without compilation
    stages      each stage for some steps, the first one killed and resumed

Runs the tests with the marker `cuda` in tests/cuda/, and prints their results and figures. Exit
code 1 if a check fails or there is no card. The table of all checks goes to docs/gpu.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trainlib.core.errors import UserError
from trainlib.core.files import ROOT, refuse_to_overwrite

CHECKS = ("attention", "model", "steps", "stages")
WORDS = {"passed": "OK", "failed": "FAILED", "skipped": "skipped"}
TABLE = ("| check | result | figure | limit |", "| --- | --- | --- | --- |")


class Row(NamedTuple):
    """A row of the table."""

    check: str
    result: str
    figure: str
    limit: str

    def line(self) -> str:
        """Return the row in Markdown; a bar would end a cell."""
        return f"| {' | '.join(cell.replace('|', '/') for cell in self)} |"


class Results:
    """A plugin of pytest that makes one row of each test."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Add a row for a test that has run, or that could not be set up or cleaned up."""
        if report.when == "call" or report.outcome != "passed":
            self.rows.append(row_of(report))

    @property
    def passed(self) -> bool:
        """Whether there was something to check and nothing failed."""
        results = {row.result for row in self.rows}
        return WORDS["passed"] in results and WORDS["failed"] not in results


def row_of(report: Any) -> Row:
    """Return the row of a test's report: what it noted, else its name and why it ended."""
    noted = dict(report.user_properties)
    figure = noted.get("figure", "")
    if report.outcome == "skipped":
        figure = report.longrepr[2].removeprefix("Skipped: ")
    elif report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = (str(crash.message if crash else report.longrepr).strip() or "?").splitlines()[0]
        figure = f"{figure} ({reason[:150]})".strip()
    check = noted.get("check", report.nodeid.rpartition("::")[2])
    return Row(check, WORDS[report.outcome], figure, noted.get("limit", ""))


def describe() -> str:
    """Return the card's name and what drives it."""
    card = torch.cuda.get_device_properties(0)
    size = f"{card.total_memory / 2**30:.0f} GiB, capability {card.major}.{card.minor}"
    versions = f"CUDA {torch.version.cuda}, torch {torch.__version__}"
    return f"{card.name}, {size}, {versions}, {time.strftime('%Y-%m-%d')}"


def run_tests(checks: list[str]) -> Results:
    """Run the tests of the named checks; pytest prints what goes wrong."""
    try:
        import pytest
    except ImportError:
        sys.exit("error: gpu_check needs pytest. Run `pip install -r requirements-dev.txt`.")
    results = Results()
    files = [str(ROOT / f"tests/cuda/test_card_{check}.py") for check in checks]
    words = ["-q", "--no-header", "--tb=short", "-m", "cuda", f"--rootdir={ROOT}"]
    pytest.main([*words, *files], plugins=[results])
    return results


def main() -> None:
    """Run all checks, or those that are named, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--out", type=Path, help="where the table goes; of all checks docs/gpu.md")
    options = parser.parse_args()
    for check in options.checks:
        if check not in CHECKS:
            parser.error(f"{check} is none of {', '.join(CHECKS)}")
    if not torch.cuda.is_available():
        sys.exit(
            "error: torch sees no CUDA device here, so nothing was checked. See `sees no card` in "
            "docs/troubleshooting.md."
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
