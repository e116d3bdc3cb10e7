"""Reader for configs/hardware.tsv, shared by several tests."""

from __future__ import annotations

import csv

from tests.docker.driving import ROOT

TABLE = ROOT / "configs/hardware.tsv"


def table() -> list[dict[str, str]]:
    lines = [line for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines, delimiter="\t"))
