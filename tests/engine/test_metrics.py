"""Tests for a run's metrics: one line per step, strict JSON, no duplicates after a resume."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from trainlib.engine.metrics import MetricsLog, as_markdown, newly_passed, truncate_metrics


def lines(folder: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_each_line_is_written_immediately(tmp_path):
    log = MetricsLog(tmp_path, None)
    log.write(0, {"val/loss": 2.0})
    log.write_step(1, {"train/loss": 1.5, "train/tokens": 64}, "step 1 loss 1.5000")
    expected = [{"step": 0, "val/loss": 2.0}, {"step": 1, "train/loss": 1.5, "train/tokens": 64}]
    assert lines(tmp_path) == expected
    assert (tmp_path / "train.log").read_text() == "step 1 loss 1.5000\n"
    log.close()
    assert lines(tmp_path) == expected


@pytest.mark.parametrize(
    "text",
    [
        "To be, or *not* to be:\nthat is\n    the question", "# no heading\n===\n1. no list\n- nor",
        "<script>alert(1)</script> & <b>bold</b> &amp;", "| a | b |\n| - | - |\n| 1 | 2 |",
        "`code` ~~~\n[link](http://x.y) ![i](j) \\* _a_ __b__",
        "第一条\n\n\n话说（一）", "", "  \n",
    ],
)  # fmt: skip
def test_a_sample_is_displayed_literally(text):
    shown = markdown_to_safe_html(as_markdown([text, "the next"]))
    first, _, second = shown.partition("<hr>")
    assert not set(re.findall(r"<(\w+)", first)) - {"p", "br"}
    assert re.sub(r"<[^>]*>", "", second).strip() == "the next"
    read = html.unescape(re.sub(r"<[^>]*>", "", first)).replace("\xa0", " ")
    assert [line.rstrip() for line in read.splitlines() if line.strip()] == [
        line for line in text.splitlines() if line.strip()
    ]


def test_an_evaluation_writes_its_samples_and_baselines(tmp_path):
    log = MetricsLog(tmp_path, None, {"unigram": 3.0, "bigram": 2.5})
    assert json.loads((tmp_path / "baselines.json").read_text()) == {"unigram": 3.0, "bigram": 2.5}
    figures = {"val/loss": 2.0, "val/bits_per_byte": 2.9}
    log.write_evaluation(0, figures, ["greedy: To be,\nor not\n", "temperature 0.8: *"], [])
    log.write_evaluation(2, figures, ["greedy: To"], ["below the unigram baseline at step 2"])
    log.close()
    assert (tmp_path / "train.log").read_text().splitlines() == [
        "sample step 0 greedy: To be,\\nor not",
        "sample step 0 temperature 0.8: *",
        "sample step 2 greedy: To",
        "below the unigram baseline at step 2",
    ]
    assert lines(tmp_path) == [{"step": 0, **figures}, {"step": 2, **figures}]
    events = EventAccumulator(str(tmp_path / "tensorboard/validation"))
    events.Reload()
    texts = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("samples/text_summary")]
    assert texts == [
        "greedy&#58; To be&#44;  \nor not\n\n---\n\ntemperature 0&#46;8&#58; &#42;",
        "greedy&#58; To",
    ]


def test_each_passed_baseline_is_reported_once():
    lines = {"uniform": 4.0, "bigram": 2.0, "unigram": 3.0}
    assert newly_passed(math.inf, lines, []) == [] == newly_passed(math.nan, lines, [])
    assert newly_passed(3.5, lines, []) == []  # uniform is skipped.
    assert newly_passed(2.4, lines, []) == ["unigram"]
    assert newly_passed(1.0, lines, []) == ["unigram", "bigram"]
    assert newly_passed(1.0, lines, ["unigram"]) == ["bigram"]
    assert newly_passed(1.0, lines, ["bigram", "unigram"]) == []


def test_values_that_are_not_finite_become_null(tmp_path):
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
    logged = (tmp_path / "train.log").read_text().splitlines()
    assert logged[4:] == ["resuming from step 2", "step 3", "step 4"]
    events = EventAccumulator(str(tmp_path / "tensorboard/train"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("overview/2 loss")]
    assert shown == [(1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0)]
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*"))


def test_a_new_run_starts_with_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    MetricsLog(tmp_path, None).close()
    assert lines(tmp_path) == []


@pytest.mark.parametrize(
    "partial", [b'{"st', b"5\n", b"[1]\n", b"null\n", b"\x00\x00", b'{"a": "\xe5']
)
def test_incomplete_last_lines_are_removed(tmp_path, partial):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "a": 2.0}\n' + partial)
    truncate_metrics(path, 9)
    assert path.read_bytes() == b'{"step": 1, "a": 2.0}\n'
    truncate_metrics(tmp_path / "none.jsonl", 9)
    assert not (tmp_path / "none.jsonl").exists()
