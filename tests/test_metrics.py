"""Protects the records of a run: one line a step, strict JSON, no step twice after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainlib.metrics import MetricsLog, cut_back


def lines(folder: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_each_line_is_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path, None)
    log.write(0, {"val/loss": 2.0})
    log.write_step(1, {"train/loss": 1.5, "train/tokens": 64}, "step 1 loss 1.5000")
    expected = [{"step": 0, "val/loss": 2.0}, {"step": 1, "train/loss": 1.5, "train/tokens": 64}]
    assert lines(tmp_path) == expected
    assert (tmp_path / "train.log").read_text() == "step 1 loss 1.5000\n"
    log.close()
    assert lines(tmp_path) == expected


def test_figures_that_are_not_finite_are_null(tmp_path):
    log = MetricsLog(tmp_path, None)
    log.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    log.close()
    assert lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": None, "d": 1.0}]


def test_a_resumed_run_has_each_step_once(tmp_path):
    log = MetricsLog(tmp_path, None)
    for step in range(1, 5):
        log.write_step(step, {"train/loss": 10.0 + step}, f"step {step}")
    log.write(4, {"val/loss": 4.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')
    log = MetricsLog(tmp_path, 2)
    for step in range(3, 5):
        log.write_step(step, {"train/loss": 20.0 + step}, f"step {step}")
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert [line["train/loss"] for line in lines(tmp_path)] == [11.0, 12.0, 23.0, 24.0]
    told = (tmp_path / "train.log").read_text().splitlines()
    assert told[4:] == ["resuming from step 2", "step 3", "step 4"]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0)]
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*"))


def test_a_fresh_run_begins_with_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    MetricsLog(tmp_path, None).close()
    assert lines(tmp_path) == []


@pytest.mark.parametrize(
    "torn", [b'{"st', b"5\n", b"[1]\n", b"null\n", b"\x00\x00", b'{"a": "\xe5']
)
def test_whatever_a_crash_left_at_the_end_goes(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "a": 2.0}\n' + torn)
    cut_back(path, 9)
    assert path.read_bytes() == b'{"step": 1, "a": 2.0}\n'
    cut_back(tmp_path / "none.jsonl", 9)
    assert not (tmp_path / "none.jsonl").exists()
