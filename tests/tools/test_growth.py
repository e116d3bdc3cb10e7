"""Tests for the page of tools.growth: what it reads from runs, and how it works in Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import growth
from tools.growth import page, read_run, read_samples, write_page
from trainlib.core.errors import UserError

EVIL = '</script><script>document.title = "broken"</script><img src=x onerror="document.title=1">'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


def write_run(folder: Path, stage: str, evaluations: list[dict], log: list[str] = ()) -> Path:
    """Write what the page reads of a run; 10 steps are 6,000 tokens, at 100 tokens/s."""
    folder.mkdir(parents=True)
    rows = [{"step": 0, **evaluations[0]}]
    for number, values in enumerate(evaluations[1:], 1):
        step, tokens = 10 * number, 6000 * number
        rows += [{"step": step, "train/tokens": tokens, "train/tokens_per_second": 100}]
        rows += [{"step": step, **values}]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "identity.json").write_text(json.dumps({"stage": stage}))
    (folder / "train.log").write_text("\n".join(log), encoding="utf-8")
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Write a run of each stage: one with samples, one with skills, one with neither."""
    pretrain = [{"val/loss": 2 * v, "val/bits_per_byte": v} for v in (3.84, 2.61, 2.23)]
    skills = [
        {"val/loss": 5, "val/bits_per_byte": 2.7 - 0.2 * i, "val/skills/sum/exact_match": i / 3,
         "val/skills/sum/words/exact_match": i / 6, "val/skills/json/exact_match": 1 - i / 9}
        for i in range(4)
    ]  # fmt: skip
    pairs = [{"val/loss": 0.69, "val/reward_accuracy": v} for v in (0.5, 0.61, 0.64)]
    texts = ("To be,0 0 0", "To be,\\nor not", f"To be,{EVIL}")
    log = [
        line for i, text in enumerate(texts) for line in
        (f"sample step {10 * i} greedy: {text}", f"sample step {10 * i} temperature 0.8: To be,{i}")
    ]  # fmt: skip
    answers = [f"sample step {10 * i} greedy: 12+30?\\n<think>{i}</think>4{i}" for i in range(4)]
    answers += ["sample step 30 temperature 0.8: 12+30?\\n"]
    folders = [
        write_run(tmp_path / "pretrain", "pretrain", pretrain, log),
        write_run(tmp_path / "sft", "sft", skills, answers),
        write_run(tmp_path / "dpo", "dpo", pairs),
    ]
    baselines = {"uniform": 3.9, "bigram": 2.35}
    (folders[0] / "baselines.json").write_text(json.dumps(baselines))
    return folders


def data_of(text: str) -> list[dict]:
    """Return the data in a page, found as a browser finds it."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found[1])["runs"]


def test_the_page_has_every_evaluation(runs):
    path = write_page(runs)
    assert path == runs[0].parent / "growth.html"
    pretrain, sft, dpo = data_of(path.read_text(encoding="utf-8"))
    assert [run["stage"] for run in (pretrain, sft, dpo)] == ["pretrain", "sft", "dpo"]
    assert pretrain["baselines"] == {"uniform": 3.9, "bigram": 2.35} and not sft["baselines"]
    first, _, last = pretrain["evaluations"]
    assert (first["step"], first["minutes"], first["bits"]) == (0, 0, 3.84)
    assert (last["step"], last["minutes"], last["bits"], last["accuracy"]) == (20, 2, 2.23, None)
    assert last["samples"] == [
        {"label": "greedy", "prompt": "To be,", "text": EVIL},
        {"label": "temperature 0.8", "prompt": "To be,", "text": "2"},
    ]
    assert sft["evaluations"][3]["skills"] == {"sum": {"trained": 1, "words": 0.5},
                                               "json": {"trained": 1 - 3 / 9}}  # fmt: skip
    assert sft["evaluations"][3]["samples"] == [
        {"label": "greedy", "prompt": "12+30?", "text": "<think>3</think>43"},
        {"label": "temperature 0.8", "prompt": "12+30?", "text": ""},
    ]
    assert [e["accuracy"] for e in dpo["evaluations"]] == [0.5, 0.61, 0.64]
    assert all(not e["samples"] and not e["skills"] for e in dpo["evaluations"])


def test_the_last_evaluation_of_a_run_shows_the_whole_test(runs):
    counts = {"sum": {"correct": 3, "total": 4}, "sum/words": {"correct": 1, "total": 2}}
    (runs[1] / "skills.json").write_text(json.dumps(counts), encoding="utf-8")
    *_, before, last = read_run(runs[1])["evaluations"]
    assert last["skills"] == {"sum": {"trained": 0.75, "words": 0.5}}
    assert before["skills"]["json"] == {"trained": 1 - 2 / 9}


def test_no_text_of_a_model_can_end_the_script(runs):
    text = page([read_run(folder) for folder in runs])
    assert text.count("</script>") == 2 and "onerror" in text and EVIL not in text
    outside = re.sub(r"https?://www\.w3\.org/\S+", "", text)
    assert not re.search(r"https?://|src=[^x]|@import|url\(", outside.replace("\\u003c", ""))


def test_samples_after_the_step_of_a_resume_are_those_of_the_resumed_run(tmp_path):
    log = tmp_path / "train.log"
    lines = [
        *["sample step 0 greedy: a", "sample step 0 greedy: a"],  # Killed before a checkpoint.
        *["step 5 loss 1.0000", "sample step 10 greedy: b", "sample step 20 greedy: old"],
        *["resuming from step 10", "sample: without a step", "sample step 20 greedy: new"],
    ]
    log.write_text("\n".join(lines))
    texts = {step: [s["text"] for s in found] for step, found in read_samples(log).items()}
    assert texts == {0: ["a"], 10: ["b"], 20: ["new"]}
    assert read_samples(tmp_path / "missing") == {}


def test_errors_say_what_to_do(runs, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"data is not a run: it has no metrics\.jsonl"):
        write_page([runs[0], tmp_path / "data"])
    assert not (tmp_path / "growth.html").exists()
    (runs[2] / "metrics.jsonl").write_text('{"step": 10, "train/loss": 1}\n')
    with pytest.raises(UserError, match="has no evaluation yet"):
        write_page(runs)
    (tmp_path / "growth.html").write_text("<title>mine</title>")
    monkeypatch.setattr(sys, "argv", ["growth", str(runs[0])])
    with pytest.raises(SystemExit, match=r"growth\.html already exists"):
        growth.main()
    (tmp_path / "growth.html").unlink()
    for _ in range(2):  # Its own page is overwritten.
        growth.main()
        assert capsys.readouterr().out.strip() == str(tmp_path / "growth.html")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize(
    "language, title", [("zh-CN", "模型是怎样成长的"), ("fr", "How the model")]
)
def test_chromium_shows_the_last_evaluation_in_the_language_of_the_reader(runs, language, title):
    assert CHROMIUM
    options = ["--headless", "--no-sandbox", "--virtual-time-budget=2000", "--dump-dom"]
    command = [CHROMIUM, *options, f"--accept-lang={language}", write_page(runs[:1]).as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    body = done.stdout.split("</head>")[1].split("<noscript>")[0]
    assert title in body and ">2.23</span>" in body and "bigram 2.35" in body
    assert "&lt;/script&gt;" in body and "<img" not in body
    assert re.search(r'<section id="skills" hidden', body)


@pytest.fixture
def chromium():
    """Yield a browser: the one in TRAIN_LLM_CHROMIUM, otherwise the system's."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    program = os.environ.get("TRAIN_LLM_CHROMIUM") or CHROMIUM
    if program is None:
        pytest.skip("no Chromium. Run apt-get install chromium, or set TRAIN_LLM_CHROMIUM=PATH")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.slow
def test_the_page_works_in_chromium(runs, chromium):
    path, errors, requests = write_page(runs), [], []
    view = chromium.new_page(locale="zh-CN", viewport={"width": 390, "height": 844})
    view.on("pageerror", lambda error: errors.append(str(error)))
    view.on("console", lambda message: errors.append(message.text))
    view.on("request", lambda request: requests.append(request.url))
    view.goto(path.as_uri())
    assert (
        view.title() == "模型是怎样成长的" and view.inner_text("#where strong") == "偏好优化（DPO）"
    )
    assert view.evaluate("document.documentElement.scrollWidth") <= 390
    view.click("text=English")
    assert view.title() == "How the model grew"

    view.focus("#slider")  # From here on only with the keyboard.
    view.keyboard.press("Home")
    assert "step 0 of 20" in view.inner_text("#where")
    view.keyboard.press("ArrowRight")
    view.keyboard.press("ArrowRight")
    assert "step 20 of 20" in view.inner_text("#where") and "2.0 minutes" in view.inner_text(
        "#where"
    )
    assert view.inner_text("#samples .prompt") == "To be,"
    assert EVIL in view.inner_text("#samples .answer") and not view.query_selector("#samples img")
    assert view.text_content("#bits h2 .value") == "2.23"
    assert "bigram 2.35" in view.text_content("#bits svg")
    for _ in range(4):
        view.keyboard.press("ArrowRight")
    assert "Fine-tuning" in view.inner_text("#where")
    widths = view.eval_on_selector_all("#skills .fill", "bars => bars.map(bar => bar.style.width)")
    assert widths == ["100%", "50%", "67%"]
    assert "(nothing)" in view.inner_text("#samples") and "<think>3" in view.inner_text("#samples")
    view.keyboard.press("End")
    assert view.text_content("#accuracy h2 .value") == "64 %"
    assert errors == [] and requests == [path.as_uri()]


@pytest.mark.slow
def test_parts_without_data_are_hidden(runs, chromium):
    (runs[2] / "train.log").unlink()
    view = chromium.new_page(locale="en-US", viewport={"width": 1200, "height": 800})
    view.goto(write_page(runs[2:]).as_uri())
    hidden = {name: not view.is_visible(f"#{name}") for name in ("samples", "bits", "skills")}
    assert all(hidden.values()) and view.is_visible("#accuracy")
    assert view.inner_text("#where strong") == "Preference optimization (DPO)"
