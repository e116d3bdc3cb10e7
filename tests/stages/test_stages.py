"""Tests for complete runs: three stages, exact resume after a kill, and clear errors."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainlib.engine.board import place

ROOT = Path(__file__).resolve().parents[2]
MODEL = [
    "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=2",
    "model.num_attention_heads=2", "model.num_key_value_heads=1", "model.head_dim=16",
]  # fmt: skip
COMMON = ["tokens_per_step=512", "log_every_steps=1", "device=cpu", "micro_batch_size=2"]


def command(script, *settings):
    return [sys.executable, str(ROOT / script), *settings]


def run(script, *settings, code=0, cwd=None):
    done = subprocess.run(
        command(script, *settings), capture_output=True, text=True, cwd=cwd, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Yield a folder with configs, data for each stage, and a separate cache."""
    path = tmp_path_factory.mktemp("workdir")
    (path / "configs").symlink_to(ROOT / "configs")
    os.environ["TRAIN_LLM_CACHE_DIR"] = str(path / "cache")
    os.environ["OMP_NUM_THREADS"] = "1"
    sentences = [f"第{i}条 the text of row {i} goes on and on. " * (i % 9 + 1) for i in range(300)]

    def talk(question, text):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": text}]

    rows = {
        "a": [{"text": text} for text in sentences],
        "sft": [{"conversations": talk(f"q {i}", sentences[i][:60])} for i in range(200)],
        "dpo": [
            {"chosen": talk(f"q {i}", f"yes {i}"), "rejected": talk(f"q {i}", f"no {i} no"),
             "source": "kind"}
            for i in range(200)
        ],
    }  # fmt: skip
    for name, values in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in values)
        (path / f"{name}.jsonl").write_text(text)
    yield path
    del os.environ["TRAIN_LLM_CACHE_DIR"], os.environ["OMP_NUM_THREADS"]


def pretrain(out_dir, *more):
    settings = ["configs/tiny_pretrain.yaml", f"out_dir={out_dir}", "data.files=a.jsonl", *MODEL]
    settings += [*COMMON, "sequence_length=64", "max_steps=12", "save_every_steps=3"]
    settings += ["data.val_max_rows=0"]  # Otherwise only the beginning of a long row may be read.
    return [*settings, "eval_every_steps=4", *more]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def figures(folder):
    """Return the metrics that do not depend on time."""
    clock = ("train/tokens_per_second", "train/data_wait", "train/mfu")
    return [{k: v for k, v in row.items() if k not in clock} for row in metrics(folder)]


@pytest.fixture(scope="module")
def pretrained(workdir):
    run("train.py", *pretrain("full"), cwd=workdir)
    return workdir / "full"


def test_a_run_writes_all_documented_files(pretrained):
    rows = metrics(pretrained)
    assert [r["step"] for r in rows if "train/loss" in r] == list(range(1, 13))
    assert [r["step"] for r in rows if "val/loss" in r] == [0, 4, 8, 12]
    assert "val/a/bits_per_byte" in rows[0] and "val/bits_per_byte" in rows[0]
    assert rows[-1]["val/loss"] < rows[0]["val/loss"] - 0.5
    assert sorted(p.name for p in pretrained.glob("step_*")) == ["step_000009", "step_000012"]
    assert (pretrained / "latest").read_text() == "step_000012"
    lines = (pretrained / "train.log").read_text().splitlines()
    logged = [line for line in lines if line.startswith("step ")]
    assert [line.split(" loss ")[0] for line in logged] == [f"step {step}" for step in range(1, 13)]
    assert [x for x in lines if x.startswith("validation at")][-1].startswith(
        "validation at step 12"
    )
    assert f"all{rows[-1]['val/loss']:26.4f}" in "\n".join(lines)
    assert lines[-1].startswith("validation was best at step 12 (loss ")
    assert json.loads((pretrained / "baselines.json").read_text())["bigram"] > 0
    runs = {path.name: EventAccumulator(str(path)) for path in pretrained.glob("tensorboard/*")}
    assert set(runs) == {"train", "validation", "unigram", "bigram"}
    for events in runs.values():
        events.Reload()
    for name in {name for row in rows for name in row} - {"step"}:
        line, tag = place(name)
        shown = runs[line].Scalars(tag)[-1]
        assert (shown.step, shown.value) == (12, pytest.approx(rows[-1 - (line == "train")][name]))
    assert [e.step for e in runs["unigram"].Scalars(place("baseline/unigram")[1])] == [0, 4, 8, 12]
    assert [e.step for e in runs["validation"].Tensors("samples/text_summary")] == [0, 4, 8, 12]
    _, info = transformers.AutoModelForCausalLM.from_pretrained(
        pretrained / "final", output_loading_info=True
    )
    assert not any(info.values())


def test_worst_rows_match_the_loss_of_transformers(workdir, pretrained):
    rows = [json.loads(x) for x in (pretrained / "worst_rows.jsonl").read_text().splitlines()]
    texts = [json.loads(x)["text"] for x in (workdir / "a.jsonl").read_text().splitlines()]
    model = transformers.AutoModelForCausalLM.from_pretrained(pretrained / "final").eval()
    words = transformers.AutoTokenizer.from_pretrained(pretrained / "final")
    assert rows and [r["bits_per_byte"] for r in rows] == sorted(
        (r["bits_per_byte"] for r in rows), reverse=True
    )
    for row in rows:
        text, bits = texts[row["line"] - 1], 0.0
        ids = [0, *words(text)["input_ids"], 0]
        for start in range(0, len(ids) - 1, 64):
            piece = torch.tensor([ids[start : start + 65]])
            with torch.no_grad():
                logits = model(piece[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits[0], piece[0, 1:], reduction="sum")
            bits += float(loss) / math.log(2)
        assert row["path"] == "a.jsonl" and row["bytes"] == len(text.encode())
        assert row["bits_per_byte"] == pytest.approx(bits / row["bytes"], abs=2e-3)
        assert row["text"].startswith("<|endoftext|>" + text[:20])
        if len(ids) <= 64:
            assert row["text"] == f"<|endoftext|>{text}<|endoftext|>"


def test_a_killed_run_resumes_with_bit_identical_results(workdir, pretrained):
    process = subprocess.Popen(
        command("train.py", *pretrain("killed")), cwd=workdir, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    folder = workdir / "killed"
    while process.poll() is None and not (folder / "latest").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "final").exists(), "the run finished before the kill"
    assert "resuming from killed/step_0000" in run("train.py", *pretrain("killed"), cwd=workdir)
    ours, theirs = (load_file(f / "final/model.safetensors") for f in (folder, pretrained))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert figures(folder) == figures(pretrained)


def test_sigterm_saves_a_checkpoint_and_stops(workdir, pretrained):
    process = subprocess.Popen(
        command("train.py", *pretrain("stopped", "save_every_steps=0")), cwd=workdir,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    folder = workdir / "stopped"
    while process.poll() is None and "step 2" not in (
        (folder / "train.log").read_text() if (folder / "train.log").exists() else ""
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "saving a checkpoint" in out
    assert not (folder / "final").exists() and (folder / "latest").exists()
    run("train.py", *pretrain("stopped", "save_every_steps=0"), cwd=workdir)
    assert figures(folder) == figures(pretrained)


def test_micro_batches_do_not_change_the_loss(workdir):
    """Use fp32, because bf16 (the default where it is faster) would exceed the tolerance."""
    for name, rows in (("wide", 2), ("micro", 3)):
        words = (f"micro_batch_size={rows}", "precision=fp32", "max_steps=12")
        run("train.py", *pretrain(name, *words), cwd=workdir)
    for ours, theirs in zip(figures(workdir / "micro"), figures(workdir / "wide"), strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-3), name


def test_a_finished_or_different_run_is_never_overwritten(workdir, pretrained):
    before = {p: p.stat().st_mtime_ns for p in pretrained.rglob("*")}
    out = run("train.py", *pretrain("full", "optim.muon_lr=0.5"), code=1, cwd=workdir)
    assert all(x in out for x in ("out_dir=NEW", "resume=never", "init_from=full/final"))
    assert before == {p: p.stat().st_mtime_ns for p in pretrained.rglob("*")}
    run("train.py", *pretrain("other", "max_steps=2", "eval_every_steps=0"), cwd=workdir)
    (workdir / "other/final").rename(workdir / "other/moved")
    out = run("train.py", *pretrain("other", "optim.muon_lr=0.5"), code=1, cwd=workdir)
    assert "optim.muon_lr: 0.01 before, 0.5 now" in out
    run("train.py", *pretrain("other", "resume=never", "max_steps=1"), cwd=workdir)
    assert (workdir / "other.1/run.yaml").exists() and (workdir / "other/final").exists()


def test_a_step_folder_can_be_resumed_in_another_folder(workdir, pretrained):
    step = "full/step_000009"
    out = run("train.py", *pretrain("full", f"resume={step}"), code=1, cwd=workdir)
    assert "would overwrite" in out
    out = run("train.py", *pretrain("branch", f"resume={step}"), cwd=workdir)
    assert f"resuming from {step}" in out
    ours, theirs = (load_file(workdir / f"{f}/final/model.safetensors") for f in ("branch", "full"))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_three_stages_run_in_sequence(workdir, pretrained):
    sft = ["configs/tiny_sft.yaml", "out_dir=sft", "init_from=full/final", "data.files=sft.jsonl"]
    out = run("sft_train.py", *sft, *COMMON, "max_steps=8", "sequence_length=64", cwd=workdir)
    rows = metrics(workdir / "sft")
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    assert "baselines in bits per byte" in out and "sample: greedy: 你是谁？\\n" in out
    dpo = ["configs/tiny_dpo.yaml", "out_dir=dpo", "init_from=sft/final", "data.files=dpo.jsonl"]
    dpo += [*COMMON, "max_steps=20", "sequence_length=64", "optim.adamw_lr=2e-3"]
    dpo += ["data.val_max_rows=0", "report_max_rows=0"]
    out = run("dpo_train.py", *dpo, "data.val_fraction=0.1", cwd=workdir)
    for stage in ("full", "sft", "dpo"):
        log = (workdir / stage / "train.log").read_text()
        for step in (row["step"] for row in metrics(workdir / stage) if "val/loss" in row):
            for label in ("greedy", "temperature 0.8"):
                assert f"sample step {step} {label}: " in log
    rows = metrics(workdir / "dpo")
    assert rows[0]["val/loss"] == pytest.approx(0.693147, abs=1e-4)
    assert rows[0]["val/reward_accuracy"] == 0.5 and rows[1]["train/mfu"] > 0
    assert not (workdir / "dpo/baselines.json").exists()
    assert rows[1]["train/loss"] == pytest.approx(0.693147, abs=1e-4)
    assert rows[-1]["val/reward_accuracy"] > 0.8
    table = json.loads((workdir / "dpo/report.json").read_text())
    n = table["kind"]["n"]
    assert n < 30 and table["kind"]["standard_error"] is None
    assert "fewer than 30 pairs, so the figures mean little: kind" in out
    assert re.search(rf"validation at step 20 +loss .* pairs\nall .* {n}\n", out)
    worst = [json.loads(x) for x in (workdir / "dpo/worst_rows.jsonl").read_text().splitlines()]
    margins = [row["reward_margin"] for row in worst]
    assert margins == sorted(margins) and worst[0]["path"] == "dpo.jsonl"
    mean = sum(margins) / len(margins)
    assert mean == pytest.approx(rows[-1]["val/reward_margin"], abs=1e-3)
    answer = json.loads((workdir / "sft/worst_rows.jsonl").read_text().splitlines()[0])
    assert f"q {answer['line'] - 1}" in answer["text"] and answer["bytes"] >= 32
    shutil.rmtree(workdir / "dpo/final")
    (workdir / "dpo/report.json").unlink()  # This simulates a kill before final/ is written.
    run("dpo_train.py", *dpo, "data.val_fraction=0.1", cwd=workdir)
    assert json.loads((workdir / "dpo/report.json").read_text())["kind"]
    dpo += ["out_dir=dpo2", "data.val_fraction=0.1", "data.val_max_rows=1"]
    again = run("dpo_train.py", *dpo, cwd=workdir)
    assert "reference: 0 answers computed" in again
    # The report reads all rows, also if the curve reads one.
    assert json.loads((workdir / "dpo2/report.json").read_text()) == table
    assert metrics(workdir / "dpo2")[0]["val/reward_accuracy"] == 0.5
    assert int(re.search(r"validation at step 20 +loss .* pairs\nall .* (\d+)\n", again)[1]) < n


def test_prepare_only_and_help_do_not_train(workdir):
    assert "caches are ready" in run("train.py", *pretrain("bad"), "--prepare-only", cwd=workdir)
    assert not (workdir / "bad").exists()
    for script in ("train.py", "sft_train.py", "dpo_train.py"):
        out = run(script, "--help", cwd=workdir)
        assert "optim.muon_lr" in out and "Peak learning rate of the matrices under Muon" in out


def test_run_yaml_describes_the_same_run(workdir, pretrained):
    text = (pretrained / "run.yaml").read_text()
    assert "max_steps: 12  # command line" in text and "seed: 0  # default" in text
    assert "already finished: full/final" in run("train.py", "full/run.yaml", cwd=workdir)
