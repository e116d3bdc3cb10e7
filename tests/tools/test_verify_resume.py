"""Tests for tools.verify_resume: a run with kills passes, and a difference is found and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tools import verify_resume
from tools.verify_resume import compare_weights, stage_of
from trainlib.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
MODEL = [f"model.{name}=16" for name in ("hidden_size", "intermediate_size", "head_dim")]
MODEL += [f"model.num_{n}=1" for n in ("hidden_layers", "attention_heads", "key_value_heads")]


def verify(tmp_path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TRAIN_LLM_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "tools.verify_resume", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


@pytest.mark.slow
def test_a_run_with_three_kills_passes(tmp_path):
    rows = [{"text": f"Row {i} is a text about {i}. " * 3} for i in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["tokens_per_step=64", "sequence_length=32", "model.max_position_embeddings=32"]
    done = verify(
        tmp_path, "configs/tiny_pretrain.yaml", f"data.files={tmp_path / 'text.jsonl'}", *MODEL,
        *small, "data.val_files=", "device=cpu", "precision=fp32", "max_steps=24", "--seed=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("configs/tiny_pretrain.yaml, seed 3, in ")
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "undisturbed", "kill 1", "kill 2", "kill 3", "typed again", "PASS",
    ]  # fmt: skip
    assert sum("killed at step" in line for line in lines) == 3
    assert "resumed from step" in lines[5] and "24 steps" in lines[5]
    assert not list(tmp_path.glob("verify_resume-*"))


def test_a_run_that_fails_is_shown(tmp_path):
    done = verify(tmp_path, "configs/tiny_sft.yaml", f"init_from={tmp_path}")
    assert done.returncode == 1 and "undisturbed failed with exit code 1" in done.stderr
    assert "config.json" in done.stderr and list(tmp_path.glob("verify_resume-*/*.log"))


@pytest.mark.parametrize("word", ["out_dir=runs/mine", "resume=never", "--sed=1", "none.yaml"])
def test_wrong_options_are_refused(word, tmp_path):
    assert verify(tmp_path, word).returncode == 2
    assert not list(tmp_path.glob("verify_resume-*"))


def write(folder: Path, device: str, change: float) -> Path:
    (folder / "final").mkdir(parents=True)
    (folder / "step_000007").mkdir()
    folder.with_suffix(".log").write_text(f"pretrain in {folder} on {device}, fp32\n")
    save_file({"a": torch.ones(2), "b": torch.ones(3) + change}, folder / "final/model.safetensors")
    save_file({"c": torch.ones(2)}, folder / "step_000007/optimizer.safetensors")
    return folder


def test_the_first_tensor_that_differs_is_named(tmp_path, capsys):
    first = write(tmp_path / "a", "cpu", 0)
    assert not compare_weights(first, write(tmp_path / "b", "cpu", 0.0005), 7)
    assert (
        "FAIL         final/model.safetensors: b differs by up to 0.0005" in capsys.readouterr().out
    )
    save_file({"c": torch.zeros(2)}, first / "step_000007/optimizer.safetensors")
    assert not compare_weights(first, write(tmp_path / "c", "cpu", 0), 7)
    assert "optimizer.safetensors: c differs by up to 1" in capsys.readouterr().out
    on_cuda = write(tmp_path / "d", "cuda:0", 0)
    assert compare_weights(on_cuda, write(tmp_path / "e", "cuda:0", 0.0005), 7)
    assert "not equal bit for bit: kernels of a GPU" in capsys.readouterr().out
    assert not compare_weights(on_cuda, write(tmp_path / "f", "cuda:0", 0.002), 7)


def test_the_name_of_a_config_says_the_stage():
    assert [stage_of(f"x/{name}.yaml") for name in ("tiny_sft", "dpo_mine", "pretrain")] == [
        "sft", "dpo", "pretrain",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"mine\.yaml: the name does not say"):
        stage_of("mine.yaml")
    assert verify_resume.KILLS == 3 and verify_resume.STEPS == 40
