"""Tests for the figures that a finished demo prints and writes to pages, and for its plot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench import plot_demo
from tools import demo, demo_figures
from trainlib.core.errors import UserError
from trainlib.evaluation import preferences


def test_cut_counts_two_columns_for_each_chinese_character():
    assert demo_figures.cut("short", 5) == "short"
    assert demo_figures.cut("你好，世界", 10) == "你好，世界"
    assert demo_figures.cut("你好，世界", 9) == "你好，世 ..."
    assert demo_figures.cut("a\nb", 20) == "a / b"


REPORT = """2026-11-26, AMD EPYC x 2, torch 2.13.0+cpu, 2.8M parameters
Minutes of training: 3.4 + 1.5 + 0.7 = 5.5

Pretraining, validation bits per byte, before -> after
  statutes        3.144 -> 1.451  (at most 1.55)

SFT, validation loss: 6.025 -> 5.461 at step 500 of 600

DPO, held-out pairs: share with a reward margin above 0
  behaviour     0.731 +- 0.020  n 487
  continuation  0.550 +- 0.025  n 407

Skills, right of held-out questions in trained wordings (95 % interval), in new
combinations of trained words, and in new words
                        after SFT                             after DPO
  sum                   198/200 (0.96-1.00)  60/60  40/60     199/200 (0.97-1.00)  60/60  41/60
  sum_direct              3/200 (0.01-0.04)   1/60   0/60       2/200 (0.00-0.04)   1/60   0/60
  larger                185/200 (0.88-0.95)  59/60  52/60     184/200 (0.87-0.95)  59/60  52/60
  json                    8/200 (0.01-0.04)   1/60   0/60       9/200 (0.00-0.04)   1/60   0/60
  three_digit_sum         0/200 (0.00-0.02)   0/60   0/60       0/200 (0.00-0.02)   0/60   0/60

Chat, greedy, at most 128 tokens; none of the questions was trained
  user       1+2=?
  assistant  <think> / 1+2=3 / </think> /  / 3
             [right]
  user       1+2=?  (--no-think)
  assistant  4
             [WRONG: 3]
"""


def test_the_summary_for_the_readme_has_the_skills_and_one_exchange():
    assert demo_figures.summary(REPORT).splitlines() == [
        "```text",
        "Minutes of training: 3.4 + 1.5 + 0.7 = 5.5; "
        "2026-11-26, AMD EPYC x 2, torch 2.13.0+cpu, 2.8M parameters",
        "Pretraining: held-out statutes, bits per byte 3.144 -> 1.451",
        "SFT, validation loss: 6.025 -> 5.461 at step 500 of 600",
        "DPO, held-out pairs with a reward margin above 0: behaviour 0.731, continuation 0.550",
        "Skills, right of held-out questions: sum 199/200, json 9/200, larger 184/200, "
        "sum_direct 2/200,",
        "  three_digit_sum 0/200",
        "user       1+2=?",
        "assistant  <think> / 1+2=3 / </think> /  / 3",
        "```",
    ]


def row(correct, total):
    return {"correct": correct, "total": total, "low": 0.5, "high": 0.75}


def test_skills_are_shown_by_wording_and_missed_targets_are_marked():
    good = {"sum": row(198, 200), "sum/combination": row(60, 60), "sum/words": row(40, 60)}
    lines = demo_figures.skill_figures(good, {**good, "sum_direct": row(3, 200)})
    [total] = [line for line in lines if line.startswith("  sum  ")]
    assert total.count("198/200 (0.50-0.75)  60/60  40/60") == 2 and "MISSED" not in total
    [direct] = [line for line in lines if "sum_direct" in line]
    assert " -  " in direct and "3/200" in direct and "MISSED" not in direct
    for name, correct in (("sum", 180), ("sum/combination", 50)):
        missed = {**good, name: row(correct, good[name]["total"])}
        assert "MISSED" in "".join(demo_figures.skill_figures(good, missed))
    lower = {**good, "sum": {**row(80, 200), "high": 0.47}}
    assert "<- LOWER in trained wordings" in "".join(demo_figures.skill_figures(good, lower))
    assert "LOWER" not in "".join(demo_figures.skill_figures(lower, good))
    assert demo_figures.conclusion({**good, "sum_direct": row(3, 200)}) == (
        "Of questions that it never saw, the model answers at least 9 of 10 right in sum, and "
        "fewer than 1 of 10 in sum_direct; it knows no facts."
    )


def test_the_figures_of_fine_tuning_are_those_of_the_weights_that_were_kept(tmp_path):
    write_run(tmp_path / "sft", [{"step": i, "val/loss": x} for i, x in ((0, 6), (5, 4), (9, 5))])
    log = tmp_path / "sft" / "train.log"
    log.write_text(
        "validation was best at step 5 (loss 4.0000); final/ has these weights, not the last, at "
        "step 9 (loss 5.0000): 1.0000 higher, standard error 0.1000\n"
    )
    figures = demo_figures.sft_figures(tmp_path / "sft")
    assert figures == ["SFT, validation loss: 6.000 -> 4.000 at step 5 of 9"]
    log.write_text("validation was best at step 9 (loss 5.0000), the last step\n")
    assert "5.000 at step 9 of 9" in demo_figures.sft_figures(tmp_path / "sft")[0]


def test_write_pages_replaces_the_text_between_the_markers(tmp_path):
    files = (tmp_path / "README.md", tmp_path / "demo.md")
    for path in files:
        path.write_text(f"{path.name}\n{demo.BEGIN}\nold\n{demo.END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        demo.write_pages({path: f"new {path.name}" for path in files})
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert text == f"{path.name}\n{demo.BEGIN}\nnew {path.name}\n{demo.END}\nafter\n"


def test_no_page_is_written_if_one_lacks_its_markers(tmp_path):
    good, bad = tmp_path / "README.md", tmp_path / "README.zh-CN.md"
    good.write_text(f"{demo.BEGIN}\nold\n{demo.END}\n", encoding="utf-8")
    bad.write_text(f"{demo.END}\nold\n{demo.BEGIN}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"README\.zh-CN\.md needs one line"):
        demo.write_pages({good: "new", bad: "new"})
    assert "old" in good.read_text(encoding="utf-8")


def test_a_full_demo_moves_a_quick_demo_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "DEMO", tmp_path / "demo")
    monkeypatch.setattr(demo, "call", lambda arguments: None)
    demo.prepare("小智", None, quick=True)
    (tmp_path / "demo/pretrain").mkdir()
    demo.prepare("小智", None, quick=True)
    assert (tmp_path / "demo/pretrain").is_dir()
    demo.prepare("小智", None, quick=False)
    assert (tmp_path / "demo.1/pretrain").is_dir() and not (tmp_path / "demo/pretrain").exists()


def test_a_transcript_needs_a_finished_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "DEMO", tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo", "--transcript"])
    with pytest.raises(SystemExit, match=r"no finished demo: .*identity\.txt"):
        demo.main()


def test_the_figures_of_a_quick_demo_are_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "DEMO", tmp_path)
    for name in ("dpo/report.json", *(f"{s}/final/model.safetensors" for s in demo.STAGES)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "identity.txt").write_text("quick\n\n", encoding="utf-8")  # A name, no author.
    assert demo.finished_name() == "quick"
    (tmp_path / "identity.txt").write_text("小智\n\nquick\n", encoding="utf-8")
    with pytest.raises(UserError, match="is a quick demo"):
        demo.finished_name()


SAVES = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: None)
print("ready", flush=True)
time.sleep(1)  # Returns early only for an exception.
time.sleep(1)
print("saved", flush=True)
"""


def test_ctrl_c_waits_until_the_stage_has_saved():
    """A terminal sends SIGINT to all processes of a command."""
    script = f"from tools import demo; demo.call(['-c', {SAVES!r}]); print('demo continues')"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(demo.__file__).parents[1], start_new_session=True,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "saved\ndemo continues\n"), err


def write_run(folder: Path, rows: list[dict], baselines: dict | None = None) -> None:
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    if baselines:
        (folder / "baselines.json").write_text(json.dumps(baselines), encoding="utf-8")


def write_demo(folder: Path) -> None:
    """Write three stages whose figures are easy to verify."""

    def step(number: int, tokens: int, speed: float, **figures: float | None) -> dict:
        named = {f"train/{name}": value for name, value in figures.items()}
        return {"step": number, "train/tokens": tokens, "train/tokens_per_second": speed, **named}

    write_run(folder / "pretrain", [
        {"step": 0, "val/bits_per_byte": 3.8}, step(10, 600, 10), step(20, 3000, 20),
        {"step": 15, "val/bits_per_byte": None}, {"step": 20, "val/bits_per_byte": 2.4},
    ], {"uniform": 3.9, "bigram": 2.5})  # fmt: skip
    write_run(folder / "sft", [
        step(10, 600, 10),
        {"step": 10, "val/bits_per_byte": 2.2, "val/skills/sum/exact_match": 0.5},
    ])  # fmt: skip
    write_run(folder / "dpo", [
        step(10, 60, 1),
        {"step": 10, "val/reward_accuracy": 0.6, "val/skills/sum/exact_match": 1.0},
    ])  # fmt: skip
    counts = {"sum": {"correct": 190, "total": 200}, "json": {"correct": 20, "total": 200},
              "sum/words": {"correct": 9, "total": 60}}  # fmt: skip
    (folder / "dpo" / "skills.json").write_text(json.dumps(counts), encoding="utf-8")


def test_each_curve_starts_at_the_minute_where_the_previous_one_ended(tmp_path):
    write_demo(tmp_path)
    pretrain, sft, dpo = plot_demo.read_curves(tmp_path)
    assert pretrain.bits_per_byte == [(0.0, 3.8), (3.0, 2.4)]  # The missing value is skipped.
    assert pretrain.baselines == {"uniform": 3.9, "bigram": 2.5} and sft.baselines == {}
    assert (sft.begin, sft.end, sft.skills["sum"]) == (3.0, 4.0, [(4.0, 0.5)])
    assert dpo.reward_accuracy == [(5.0, 0.6)] and dpo.skills["sum"] == [(5.0, 1.0)]
    assert dpo.tested == {"sum": 0.95, "json": 0.1, "sum/words": 0.15}


def test_labels_do_not_overlap():
    assert plot_demo.spread([3.9, 3.5, 3.4, 2.0], 0.25) == [3.9, 3.5, 3.25, 2.0]


def test_the_plot_labels_stages_and_baselines(tmp_path):
    pytest.importorskip("matplotlib")
    write_demo(tmp_path)
    pictures = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for picture in pictures:
        plot_demo.draw(plot_demo.read_curves(tmp_path), picture)
    one, two = (picture.read_text(encoding="utf-8") for picture in pictures)
    assert one == two  # The plot is deterministic.
    texts = ["pretraining", "fine-tuning", "DPO", "uniform 3.90", "2.40", "0.95 sum", "0.60 pairs",
             "5 minutes of training: 2.40 bits per byte of held-out text (bigrams 2.50)",
             "kinds of new questions with at least 9 of 10 right answers: 1 of 2"]  # fmt: skip
    for text in texts:
        assert f">{text}<" in one, text


def test_the_figures_of_preferences_come_from_the_report_that_dpo_writes(tmp_path, monkeypatch):
    data = SimpleNamespace(val={"": None})
    rows = [("ranked" if i < 5 else "skill_sum" if i < 10 else "behaviour", np.ones(5) * (i % 4))
            for i in range(50)]  # fmt: skip
    monkeypatch.setattr(preferences, "pair_margins", lambda *_: rows)
    run = SimpleNamespace(folder=tmp_path)
    preferences.write_report(run, data, np.zeros(1), np.zeros(1))  # type: ignore[arg-type]
    title, behaviour, own = demo_figures.dpo_figures(tmp_path)
    assert title.startswith("DPO") and "behaviour     0.8" in behaviour and " n 40 " in behaviour
    assert "+- 0.0" in behaviour and own.strip().startswith("own preference 0.8")
