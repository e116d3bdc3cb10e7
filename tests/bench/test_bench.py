"""Protects what of the benchmarks needs no time: their command lines, settings and page."""

from __future__ import annotations

import json

import pytest

from bench.ablations import CENTRE, CHANGES, CONFIGS, is_default
from bench.common import RECORDS, ROOT, parser_of
from bench.report import WHAT, page
from trainlib.core.settings import load_config, recipe

MACHINE = {"cpu": "A CPU", "threads": 2, "torch": "2.13", "date": "2026-01-01", "commit": "abc"}


@pytest.mark.parametrize("stage", CHANGES)
def test_each_ablation_changes_the_recipe_and_no_two_are_alike(stage):
    file, centre = ROOT / f"configs/tiny_{stage}.yaml", CENTRE[stage].split()
    found = [
        repr(recipe(load_config(CONFIGS[stage], [*centre, *change.split()], file)))
        for change in CHANGES[stage]
    ]
    assert len(set(found)) == len(found) and CHANGES[stage][0] == ""


@pytest.mark.parametrize("stage", CHANGES)
def test_the_recipe_is_one_of_the_settings_that_were_compared(stage):
    assert sum(is_default(stage, change) for change in CHANGES[stage]) == 1


def test_a_figure_that_does_not_exist_is_named_with_those_that_do(capsys):
    parser = parser_of("costs", "", ["mfu", "start"])
    assert parser.parse_args([]).names == [] and parser.parse_args(["mfu"]).names == ["mfu"]
    with pytest.raises(SystemExit):
        parser.parse_args(["mfv"])
    assert "mfv is none of mfu, start" in capsys.readouterr().err


def test_the_page_gives_the_last_record_of_each_figure():
    first, second = ({**MACHINE, "figure": "mfu", "median": value, "values": [0.25, value, 0.75],
                      "aim": ">= 0.65"} for value in (0.5, 0.625))  # fmt: skip
    text = page([first, second], [])
    assert "## A CPU, 2 threads, torch 2.13" in text
    assert "| mfu | 0.625 (0.25 to 0.75) | >= 0.65 |" in text and "0.5 (" not in text


def test_ablations_are_ordered_and_compared_seed_by_seed():
    """The change is 0.1 better with each of its two seeds, though the centre's mean is lower."""
    values = [("", 0, 2.0), ("", 1, 3.0), ("", 2, 1.0), ("seed=9", 0, 1.9), ("seed=9", 1, 2.9)]
    runs = [
        {
            "stage": "sft",
            "change": change,
            "seed": seed,
            "tokens": 4000,
            "value": value,
            "default": bool(change),
        }  # fmt: skip
        for change, seed, value in values
    ]
    lines = page([], runs).splitlines()
    centre, changed = (next(i for i, s in enumerate(lines) if s.startswith(f"| {name}"))
                       for name in ("the centre", "`seed=9`"))  # fmt: skip
    assert changed < centre
    assert lines[changed] == "| `seed=9` **(the recipe)** | +0.1000 | 2.4000 | 0.7071 | 2 |"
    assert lines[centre] == "| the centre |  | 2.0000 | 1.0000 | 3 |"


def test_every_record_has_a_line_on_the_page():
    figures = {json.loads(line)["figure"] for line in RECORDS.open(encoding="utf-8")}
    assert len(figures) > 15 and figures == set(WHAT)
