"""Tests of the report on preference pairs: few pairs have no standard error."""

from __future__ import annotations

from trainlib.evaluation.preferences import format_report


def test_the_report_of_few_pairs_has_n_and_no_standard_error():
    row = {"accuracy": 0.75, "own_before": 0.5, "own_after": 0.5,
           "rule": "longer", "rule_accuracy": 0.5}  # fmt: skip
    table = {"many": {**row, "n": 30, "standard_error": 0.079},
             "few": {**row, "n": 29, "standard_error": None}}  # fmt: skip
    _, many, few, note = format_report(table)
    assert many.split()[:4] == ["many", "30", "0.750", "0.079"]
    assert few.split()[:4] == ["few", "29", "0.750", "-"]
    assert note == "fewer than 30 pairs, so the figures mean little: few"
