"""Tests that final/ gets the weights with the smallest validation loss, also after a kill."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import ModelConfig, Transformer
from trainlib.engine import best as best_module
from trainlib.engine import loop
from trainlib.engine.checkpoint import Checkpoints
from trainlib.models.hf_folder import model_files

ROOT = Path(__file__).resolve().parents[2]
SIZES = ModelConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=16,
                    num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
WORDS = "red blue green dog cat bird house tree river stone".split()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tokenizer):
    """Return a folder with a random model and rows that can only be memorized."""
    path = tmp_path_factory.mktemp("best")
    (path / "configs").symlink_to(ROOT / "configs")
    rng = random.Random(0)
    for name, count in (("sft", 24), ("val", 40), ("other", 40)):
        rows = [
            {"conversations": [{"role": "user", "content": rng.choice(WORDS)},
                               {"role": "assistant", "content": " ".join(rng.choices(WORDS, k=6))}]}
            for _ in range(count)
        ]  # fmt: skip
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    model = Transformer(SIZES)
    (path / "base").mkdir()
    for name, content in model_files(model.config, tokenizer).items():
        (path / "base" / name).write_text(content, encoding="utf-8")
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    save_file(tensors, path / "base/model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(autouse=True)
def in_workdir(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(workdir / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def settings(out_dir, *more):
    return [
        f"out_dir={out_dir}", "init_from=base", "data.files=sft.jsonl", "data.val_files=val.jsonl",
        "max_steps=60", "tokens_per_step=256", "sequence_length=32", "micro_batch_size=4",
        "device=cpu", "precision=fp32", "eval_every_steps=6", "save_every_steps=15",
        "keep_checkpoints=9", "optim.muon_lr=0.05", "optim.embedding_lr=2e-2",
        "optim.decay_fraction=0", *more,
    ]  # fmt: skip


def losses(folder):
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}


def same(folder, other):
    ours, theirs = (load_file(Path(f) / "model.safetensors") for f in (folder, other))
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def finished(workdir, run_stage):
    if not Path("full").exists():
        assert run_stage("sft", *settings("full")) == 0
    return Path("full")


def test_final_has_the_weights_with_the_smallest_validation_loss(finished, run_stage):
    values = losses(finished)
    assert list(values) == list(range(0, 61, 6))
    best = min(values, key=lambda step: values[step])
    assert 0 < best < 60 and values[60] > values[best] + 0.2, "the run does not overfit"
    assert json.loads((finished / "best/validation.json").read_text())["step"] == best
    assert same("full/final", "full/best") and not same("full/final", "full/step_000060")
    text = f"validation was best at step {best} (loss {values[best]:.4f}); final/ has these weights"
    assert text in (finished / "train.log").read_text()
    card = (finished / "final/README.md").read_text(encoding="utf-8")
    assert f"\n- {best} steps on" in card and f"validation at step {best} " in card
    # The loss of final/ itself, measured by another run.
    assert run_stage("sft", *settings("again", "init_from=full/final", "max_steps=1")) == 0
    assert losses("again")[0] == pytest.approx(values[best], abs=1e-5)


def test_best_is_not_a_checkpoint_to_resume_from(finished, run_stage, capsys):
    assert Checkpoints(finished, 1).newest() == finished / "step_000060"
    assert run_stage("sft", *settings("elsewhere", "resume=full/best")) == 1
    assert "is not a step folder" in capsys.readouterr().err


@pytest.mark.parametrize("error, expected", [(None, "best"), (9.0, "step_000060")])
def test_a_run_killed_before_final_is_written_chooses_the_same_weights(
    finished, run_stage, error, expected, capsys, monkeypatch
):
    shutil.copytree(finished, "killed", dirs_exist_ok=True)
    shutil.rmtree("killed/final")
    if error is not None:  # Then the last loss is within one standard error.
        monkeypatch.setattr(best_module, "difference_error", lambda *_: error)
    assert run_stage("sft", *settings("killed")) == 0
    assert same("killed/final", f"full/{expected}")
    assert ("; final/ has the last weights" in capsys.readouterr().out) == (error is not None)
    assert losses("killed") == losses(finished)
    shutil.rmtree("killed")


def test_a_run_killed_after_its_best_step_resumes_with_the_same_result(finished):
    command = [sys.executable, str(ROOT / "sft_train.py"), *settings("kill9")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not Path("kill9/best").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not Path("kill9/final").exists(), "the run finished before the kill"
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert same("kill9/final", "full/final") and losses("kill9") == losses(finished)


def test_evaluations_and_keep_best_do_not_change_the_training(finished, run_stage):
    more = ("eval_every_steps=0", "keep_best=off")
    assert run_stage("sft", *settings("plain", *more)) == 0
    for name in ("model", "optimizer"):
        ours, theirs = (load_file(f"{f}/step_000060/{name}.safetensors") for f in ("full", "plain"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert same("plain/final", "plain/step_000060") and not Path("plain/best").exists()
    assert "validation was best at step 60" in Path("plain/train.log").read_text()


def test_best_starts_again_if_the_validation_set_has_changed(finished, run_stage, capsys):
    shutil.copytree(finished, "changed")
    shutil.rmtree("changed/final")
    more = ("data.val_files=other.jsonl", "resume=changed/step_000045")
    assert run_stage("sft", *settings("changed", *more)) == 0
    out = capsys.readouterr().out
    assert out.count("best starts again: the validation set has changed") == 1
    values = {step: loss for step, loss in losses("changed").items() if step > 45}
    record = json.loads(Path("changed/best/validation.json").read_text())
    assert record["step"] == min(values, key=lambda step: values[step])


def test_best_starts_again_if_an_earlier_checkpoint_is_named(finished, run_stage, capsys):
    """Its settings may differ, so later weights do not belong to the run."""
    shutil.copytree(finished, "earlier")
    shutil.rmtree("earlier/final")
    assert run_stage("sft", *settings("earlier", "resume=earlier/step_000015")) == 0
    assert "best starts again: step 30 comes after the checkpoint" in capsys.readouterr().out
    assert same("earlier/final", "full/final") and losses("earlier") == losses(finished)


def test_a_finish_file_ends_a_run_with_its_best_weights(finished, run_stage):
    shutil.copytree(finished, "ended")
    shutil.rmtree("ended/final")
    Path("ended/latest").write_text("step_000030")
    for step in (45, 60):
        shutil.rmtree(f"ended/step_0000{step}")
    Path("ended/FINISH").touch()
    assert run_stage("sft", *settings("ended")) == 0
    assert max(losses("ended")) == 32 and same("ended/final", "full/best")


def test_a_run_with_a_time_limit_ends_with_its_best_weights(run_stage):
    lengths = ("max_steps=0", "max_hours=0.001", "save_every_steps=0")
    assert run_stage("sft", *settings("timed", *lengths)) == 0
    values = losses("timed")
    best = min((step for step in values if step), key=lambda step: values[step])
    assert json.loads(Path("timed/best/validation.json").read_text())["step"] == best


def test_a_run_that_only_gets_worse_warns_and_ends_with_a_trained_model(finished, run_stage):
    more = ("init_from=full/final", "max_steps=6", "eval_every_steps=2", "optim.muon_lr=2")
    assert run_stage("sft", *settings("worse", *more)) == 0
    values = losses("worse")
    assert values[0] == min(values.values())
    log = Path("worse/train.log").read_text()
    assert f"training did not improve validation (loss {values[0]:.4f} at step 0)" in log
    assert not same("worse/final", "full/final")
    record = json.loads(Path("worse/best/validation.json").read_text())
    assert record["loss"] == min(loss for step, loss in values.items() if step)


def test_damaged_best_weights_are_found_again(finished, run_stage, monkeypatch, capsys):
    best = json.loads((finished / "best/validation.json").read_text())["step"]
    assert best > 6, "the oldest checkpoint is not before the best step"
    calls, step = itertools.count(1), loop.optimizer_step

    def broken(*arguments):
        if next(calls) == best + 9:
            raise OSError(5, "Input/output error")
        return step(*arguments)

    arguments = settings("damaged", "save_every_steps=6")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", broken)
        assert run_stage("sft", *arguments) == 1
    (Path("damaged/best") / "model.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert run_stage("sft", *arguments) == 0
    assert "damaged/best is damaged; the best weights are searched" in capsys.readouterr().out
    assert same("damaged/final", "full/final") and losses("damaged") == losses(finished)
