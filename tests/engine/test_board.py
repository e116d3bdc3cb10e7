"""Tests for TensorBoard's page with its default settings: names, order, and the smoothed lines."""

from __future__ import annotations

import html
import re
import shutil
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainlib.engine.board import GAP, place
from trainlib.engine.metrics import MetricsLog

BITS = "overview/1 bits_per_byte"
BASELINES = {"uniform": 3.9, "unigram": 3.4, "bigram": 2.35}
CURVE = {0: 3.84, 39: 3.2, 78: 2.8, 117: 2.68, 156: 2.57, 195: 2.43, 234: 2.23}
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


def read(folder: Path) -> dict[str, EventAccumulator]:
    """Return the events of each run folder by its name."""
    runs = {path.name: EventAccumulator(str(path)) for path in (folder / "tensorboard").iterdir()}
    for events in runs.values():
        events.Reload()
    return runs


def evaluate(log: MetricsLog, step: int, value: float) -> None:
    values = {"val/loss": 2 * value, "val/bits_per_byte": value, "val/a/loss": value}
    values |= {"val/skills/sum/exact_match": 0.5, "val/skills/sum/words/exact_match": 0.25}
    log.write_evaluation(step, values, [f"greedy: To be {step}"], [])


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(folder, None, BASELINES)
    for step, value in CURVE.items():
        evaluate(log, step, value)
        names = ("loss", "lr", "grad_norm", "tokens_per_second", "data_wait", "mfu")
        log.write_step(step + 1, dict.fromkeys([f"train/{name}" for name in names], 1.0), "step")
    log.close()


def smoothed(values: list[float], factor: float = 0.6) -> float:
    """Return the end of a line as the page draws it."""
    end = 0.0
    for value in values:
        end = factor * end + (1 - factor) * value
    return end / (1 - factor ** len(values))


def test_named_lines_share_a_chart_and_charts_are_in_order(tmp_path):
    write(tmp_path)
    runs = read(tmp_path)
    assert set(runs) == {"train", "validation", "unigram", "bigram", "sum"}
    assert {name for name in runs if BITS in runs[name].Tags()["scalars"]} == {
        "validation", "unigram", "bigram",
    }  # fmt: skip
    tags = sorted({tag for events in runs.values() for tag in events.Tags()["scalars"]})
    assert tags == [
        BITS, "overview/2 loss", "overview/3 exact_match", "overview/3 exact_match words",
        "overview/4 lr", "overview/5 grad_norm", "overview/6 tokens_per_second",
        "overview/7 data_wait", "train/mfu", "val/a/loss",
    ]  # fmt: skip
    for name in ("unigram", "bigram"):
        shown = [(e.step, round(e.value, 4)) for e in runs[name].Scalars(BITS)]
        assert shown == [(step, BASELINES[name]) for step in CURVE]
    texts = runs["validation"].Tensors("samples/text_summary")
    assert [e.step for e in texts] == list(CURVE)


def test_rewards_are_charts_and_other_metrics_keep_their_names():
    assert place("val/reward_margin") == ("validation", "overview/8 reward_margin")
    assert place("train/reward_accuracy") == ("train", "overview/9 reward_accuracy")
    for name in ("val/chosen_log_probs", "val/skills/loss", "val/loss/loss"):
        assert place(name) == ("validation", name)
    assert place("train/bits_per_byte") == ("train", "train/bits_per_byte")


def test_the_smoothed_line_ends_at_the_value(tmp_path):
    write(tmp_path)
    events = read(tmp_path)["validation"].Scalars(BITS)
    shown = [(e.step, e.value) for e in events]
    for (begin, first), (end, last) in pairwise(CURVE.items()):
        points = [(step, value) for step, value in shown if begin < step <= end]
        assert points[-1] == (end, pytest.approx(last))
        line = [first + (last - first) * (step - begin) / (end - begin) for step, _ in points]
        assert [value for _, value in points] == pytest.approx(line)
        drawn = smoothed([value for step, value in shown if step <= end])
        assert abs(drawn - last) < 2 * GAP
    assert abs(smoothed(list(CURVE.values())) - last) > 0.1  # Without additional points.
    assert all(a.wall_time <= b.wall_time for a, b in pairwise(events))


def test_a_resume_removes_later_points_from_all_runs(tmp_path):
    write(tmp_path)
    log = MetricsLog(
        tmp_path, 100, BASELINES
    )  # The evaluations before and after are at 78 and 117.
    log.close()
    for name, events in read(tmp_path).items():
        steps = [e.step for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
        assert max(steps) == (79 if name == "train" else 78)
    log = MetricsLog(tmp_path, 100, BASELINES)
    evaluate(log, 117, 2.7)
    log.close()
    shown = [(e.step, e.value) for e in read(tmp_path)["validation"].Scalars(BITS)]
    assert shown == sorted(shown, key=lambda point: point[0]) and len(shown) > 2 + 4
    assert shown[-1] == (117, pytest.approx(2.7))
    assert abs(smoothed([value for _, value in shown]) - 2.7) < 2 * GAP


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that takes no files")
def test_points_that_cannot_be_written_are_reported_once(tmp_path, caplog, capfd):
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard/train").symlink_to("/proc/self")
    log = MetricsLog(tmp_path, 3)
    for step in (4, 5):
        log.write_step(step, {"train/loss": 2.0}, f"step {step}")
        evaluate(log, step, 2.0)
    log.close()
    assert len((tmp_path / "train.log").read_text().splitlines()) == 5
    assert len(caplog.messages) == 1 and "could not be written" in caplog.text
    assert "Traceback" not in capfd.readouterr().err


def test_values_that_are_not_finite_are_one_point(tmp_path):
    log = MetricsLog(tmp_path, None)
    for step, value in enumerate((float("inf"), 2.0, float("nan"), 2.5, 2.5)):
        log.write_evaluation(4 * step, {"val/loss": value}, [], [])
    log.close()
    steps = [e.step for e in read(tmp_path)["validation"].Scalars("overview/2 loss")]
    assert steps[:4] == [0, 4, 8, 12] and steps[4:] == [16]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_in_a_browser(tmp_path):
    """Read from the page as it opens: the order of the charts, and the table below each."""
    write(tmp_path / "runs/demo/pretrain")
    log = MetricsLog(tmp_path / "runs/demo/pretrain", 200, BASELINES)
    evaluate(log, 234, 2.23)
    log.close()
    charts = open_page(tmp_path)
    assert list(charts)[:4] == [
        "1 bits_per_byte", "2 loss", "3 exact_match", "3 exact_match words",
    ]  # fmt: skip
    values = {"validation": 2.23, "bigram": 2.35, "unigram": 3.4}
    shown = charts["1 bits_per_byte"]
    assert set(shown) == {f"demo/pretrain/tensorboard/{name}" for name in values}
    for name, value in values.items():
        drawn, measured, step = shown[f"demo/pretrain/tensorboard/{name}"]
        assert (measured, step) == (value, 234)
        assert abs(drawn - value) < 0.02
    assert set(charts["3 exact_match"]) == {"demo/pretrain/tensorboard/sum"}


def open_page(folder: Path) -> dict[str, dict[str, tuple[float, float, int]]]:
    """Return for each chart of the page: smoothed value, value and step of each line by name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder / "runs"),
         "--host", "127.0.0.1", "--port", str(port), "--load_fast", "false"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(port)
        for _ in range(10):  # TensorBoard may still be reading the events.
            page = subprocess.run(
                [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                 "--window-size=1600,4000", "--virtual-time-budget=30000",
                 f"--user-data-dir={folder / 'profile'}", f"http://127.0.0.1:{port}/"],
                capture_output=True, text=True, timeout=120, check=True,
            ).stdout  # fmt: skip
            if charts := read_charts(page):
                return charts
            time.sleep(2)
        raise AssertionError(page[:2000])
    finally:
        server.terminate()
        server.wait()


def wait_for(port: int) -> None:
    for _ in range(240):
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.25)
    raise AssertionError("TensorBoard did not start")


def read_charts(page: str) -> dict[str, dict[str, tuple[float, float, int]]]:
    charts = {}
    for card in page.split("<scalar-card-component")[1:]:
        words = [html.unescape(word).strip() for word in re.split(r"<[^>]*>", card)]
        words = [word for word in words if word]
        title = next(word for word in words if word.startswith("/"))  # After the group's name.
        rows = [i for i, word in enumerate(words) if "/tensorboard/" in word]
        charts[title[1:]] = {
            words[i]: (float(words[i + 1]), float(words[i + 2]), int(words[i + 3])) for i in rows
        }
    return charts
