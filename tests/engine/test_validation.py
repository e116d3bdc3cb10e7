"""Tests for the number of evaluations in a run, and for the standard error of validation losses."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from trainlib.engine.validation import (
    difference_error,
    steps_between_evaluations,
)


def training(num_steps, val_rows=(30, 30), every="auto", rows_per_step=10):
    val = {str(i): SimpleNamespace(num_rows=lambda n=n: n) for i, n in enumerate(val_rows)}
    return SimpleNamespace(
        run=SimpleNamespace(config=SimpleNamespace(eval_every_steps=every)),
        schedule=SimpleNamespace(num_steps=num_steps),
        loader=SimpleNamespace(rows_per_step=rows_per_step),
        datasets=SimpleNamespace(val=val),
    )


@pytest.mark.parametrize("num_steps", [1, 7, 60, 100, 219, 345, 391, 2001, 100_000])
@pytest.mark.parametrize("val_rows", [(1,), (30, 30), (500,)])
def test_auto_evaluates_about_ten_times_within_a_tenth_of_the_run(num_steps, val_rows):
    every = steps_between_evaluations(training(num_steps, val_rows))
    steps = {0, num_steps} | {s for s in range(1, num_steps) if every and s % every == 0}
    cost = len(steps) * sum(val_rows) / 3 / 10  # In steps: no backward pass, 10 rows a step.
    assert len(steps) <= 11 and (every == 0 or cost <= 0.1 * num_steps)
    if 11 * sum(val_rows) / 30 <= 0.1 * num_steps and num_steps >= 100:
        assert len(steps) >= 10


def test_a_number_is_kept_and_an_unknown_length_leaves_the_choice_to_the_clock():
    assert steps_between_evaluations(training(100, every=7)) == 7
    assert steps_between_evaluations(training(10_000, every=0)) == 0
    assert steps_between_evaluations(training(None)) == 0


def test_the_standard_error_is_that_of_repeated_validation():
    """Compare with the spread of the difference over many validation sets from one distribution."""
    rng = np.random.default_rng(0)

    def draw():
        n = rng.integers(20, 200, 40).astype(float)  # Batches differ in size,
        level = 5 + rng.normal(0, 1, 40)  # and in difficulty, which pairing removes.
        first = list(zip(n * level, n, strict=True))
        return first, list(zip(n * (level + 0.1 + rng.normal(0, 0.2, 40)), n, strict=True))

    def mean(batches):
        return sum(s for s, _ in batches) / sum(n for _, n in batches)

    pairs = [draw() for _ in range(2000)]
    spread = np.std([mean(second) - mean(first) for first, second in pairs])
    assert np.mean([difference_error(*pair) for pair in pairs]) == pytest.approx(spread, rel=0.07)
    assert np.std([mean(first) for first, _ in pairs]) > 3 * spread


def test_equal_batches_give_the_textbook_formula_and_other_batches_have_no_error():
    values = [1.0, 2.0, 4.0, 9.0]
    zeros, batches = [(0, 10)] * 4, [(10 * v, 10) for v in values]
    assert difference_error(zeros, batches) == pytest.approx(np.std(values, ddof=1) / 2)
    assert difference_error(batches, batches) == 0 == difference_error(zeros[:1], batches[:1])
    assert difference_error(zeros[:3], batches) == 0
