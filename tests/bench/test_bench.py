"""Tests for the untimed parts of the benchmarks: options, settings and the generated page."""

from __future__ import annotations

import json

import pytest

from bench.ablations import BASELINE, CHANGES, CONFIGS, is_default
from bench.common import RECORDS, ROOT, make_parser
from bench.report import DESCRIPTIONS, page
from trainlib.core.settings import load_config, recipe

MACHINE = {"cpu": "A CPU", "threads": 2, "torch": "2.13", "date": "2026-01-01", "commit": "abc"}


@pytest.mark.parametrize("stage", CHANGES)
def test_every_ablation_has_a_different_recipe(stage):
    file, baseline = ROOT / f"configs/tiny_{stage}.yaml", BASELINE[stage].split()
    found = [
        repr(recipe(load_config(CONFIGS[stage], [*baseline, *change.split()], file)))
        for change in CHANGES[stage]
    ]
    assert len(set(found)) == len(found) and CHANGES[stage][0] == ""


@pytest.mark.parametrize("stage", CHANGES)
def test_exactly_one_change_is_the_recipe(stage):
    assert sum(is_default(stage, change) for change in CHANGES[stage]) == 1


def test_the_error_for_an_unknown_benchmark_lists_the_known_ones(capsys):
    parser = make_parser("costs", "", ["mfu", "start"])
    assert parser.parse_args([]).names == [] and parser.parse_args(["mfu"]).names == ["mfu"]
    with pytest.raises(SystemExit):
        parser.parse_args(["mfv"])
    assert "unknown name mfv. Choose from mfu, start" in capsys.readouterr().err


def test_the_page_shows_the_last_record_of_each_benchmark():
    first, second = ({**MACHINE, "figure": "mfu", "median": value, "values": [0.25, value, 0.75],
                      "aim": ">= 0.65"} for value in (0.5, 0.625))  # fmt: skip
    text = page([first, second], [])
    assert "## A CPU, 2 threads, torch 2.13" in text
    assert "| mfu | 0.625 (0.25 to 0.75) | >= 0.65 |" in text and "0.5 (" not in text


def test_ablations_are_sorted_by_the_gain_for_the_same_seeds():
    """The change is 0.1 better for both of its seeds, although the baseline has a lower mean."""
    values = [("", 0, 2.0), ("", 1, 3.0), ("", 2, 1.0), ("seed=9", 0, 1.9), ("seed=9", 1, 2.9)]
    runs = [
        {
            "stage": "sft",
            "change": change,
            "seed": seed,
            "tokens": 4000,
            "value": value,
            "default": bool(change),
            "current": seed < 2,
            "date": f"2026-11-0{seed + 1}",
        }  # fmt: skip
        for change, seed, value in values
    ]
    lines = page([], runs).splitlines()
    baseline, changed = (next(i for i, s in enumerate(lines) if s.startswith(f"| {name}"))
                         for name in ("baseline", "`seed=9`"))  # fmt: skip
    assert changed < baseline
    assert lines[changed] == "| `seed=9` **(recipe)** | +0.1000 | 2.4000 | 0.7071 | 2 |"
    assert lines[baseline] == "| baseline |  | 2.0000 | 1.0000 | 3 |"
    assert "Measured until 2026-11-03; the sample or the recipe changed since." in lines


def test_every_recorded_benchmark_has_a_description():
    names = {json.loads(line)["figure"] for line in RECORDS.open(encoding="utf-8")}
    assert len(names) > 15 and names == set(DESCRIPTIONS)
