"""Tests that each key in --help can be set, and that a run uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dpo_train import DPOConfig
from model import ModelConfig, Transformer
from sft_train import SFTConfig
from train import PretrainConfig
from trainlib.core.parsing import parse
from trainlib.core.settings import keys
from trainlib.models.hf_folder import model_files

ROOT = Path(__file__).resolve().parents[2]
STAGES = {
    "pretrain": ("train.py", PretrainConfig),
    "sft": ("sft_train.py", SFTConfig),
    "dpo": ("dpo_train.py", DPOConfig),
}
LENGTHS = {
    "max_steps": "4", "max_tokens": "1000", "epochs": "2", "max_hours": "0.002",
}  # fmt: skip
# A value other than the default for every key except the lengths.
VALUES = {
    "out_dir": "out", "init_from": "", "resume": "never", "seed": "7", "tokenizer": "",
    "tokens_per_step": "256", "sequence_length": "64", "device": "cpu", "ranks": "2",
    "precision": "fp32", "compile": "off", "kernels": "plain",
    "micro_batch_size": "1", "eval_every_steps": "2",
    "save_every_steps": "3", "log_every_steps": "2", "keep_checkpoints": "1",
    "keep_best": "on", "beta": "0.2", "chosen_penalty": "0.5", "report_max_rows": "2",
    "model.vocab_size": "6401", "model.hidden_size": "32", "model.intermediate_size": "48",
    "model.num_hidden_layers": "2", "model.num_attention_heads": "4",
    "model.num_key_value_heads": "2", "model.head_dim": "8",
    "model.max_position_embeddings": "128", "model.rope_theta": "5e3",
    "model.rms_norm_eps": "1e-5", "model.tie_word_embeddings": "off",
    "model.initializer_range": "0.03", "data.files": "", "data.val_files": "",
    "data.val_fraction": "0.1", "data.val_max_rows": "3", "data.format": "",
    "data.columns": "[system:persona]", "data.markers": "keep",
    "data.alpaca_join": "none", "data.on_error": "skip", "data.too_long": "drop",
    "data.max_row_mb": "64", "data.verify_cache": "on",
    "optim.name": "adamw", "optim.muon_lr": "0.01", "optim.adamw_lr": "2e-3",
    "optim.embedding_lr": "1e-3", "optim.weight_decay": "0.1", "optim.momentum": "0.9",
    "optim.beta1": "0.8", "optim.beta2": "0.9", "optim.grad_clip": "0.5",
    "optim.schedule": "cosine", "optim.warmup_fraction": "0.2", "optim.decay_fraction": "0.3",
    "optim.final_lr_fraction": "0.1",
}  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Return a folder with configs and data for each stage."""
    path = tmp_path_factory.mktemp("keys")
    (path / "configs").symlink_to(ROOT / "configs")

    def talk(i, answer):
        return [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": answer}]

    rows = {
        "pretrain": [{"text": f"row {i} goes on and on " * (i % 5 + 1)} for i in range(80)],
        "sft": [{"conversations": talk(i, f"answer {i}")} for i in range(80)],
        "dpo": [{"chosen": talk(i, f"yes {i}"), "rejected": talk(i, f"no {i}")} for i in range(80)],
    }
    for stage, values in rows.items():
        for name in (stage, f"{stage}_val"):
            text = "".join(json.dumps({**row, "persona": "Be kind."}) + "\n" for row in values)
            (path / f"{name}.jsonl").write_text(text)
    return path


def run(workdir, stage, length, out_dir, init_from):
    script, cls = STAGES[stage]
    settings = {**VALUES, length: LENGTHS[length], "out_dir": out_dir}
    settings |= {"data.files": f"{stage}.jsonl", "data.val_files": f"{stage}_val.jsonl"}
    settings |= {"data.format": "auto"}
    settings["tokenizer" if stage == "pretrain" else "init_from"] = init_from
    names = {key.name for key in keys(cls)}
    words = [f"{name}={value}" for name, value in settings.items() if name in names and value]
    env = {**os.environ, "TRAIN_LLM_CACHE_DIR": str(workdir / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(ROOT / script), *words], cwd=workdir, env=env,
                          capture_output=True, text=True, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    written = yaml.safe_load((workdir / out_dir / "run.yaml").read_text())
    for key in keys(cls):
        value = settings.get(key.name)
        if value and key.name not in ("data.files", "data.val_files"):
            found = written
            for part in key.name.split("."):
                found = found[part]
            assert parse(key.type, str(found)) == parse(key.type, value), key.name
    assert (workdir / out_dir / "final/model.safetensors").exists()
    return [json.loads(line) for line in (workdir / out_dir / "metrics.jsonl").open()]


def test_every_key_has_a_test_value():
    for _, cls in STAGES.values():
        assert {key.name for key in keys(cls)} <= {*VALUES, *LENGTHS}


def test_beta_scales_the_first_gradient(workdir, tmp_path, monkeypatch, run_stage, tokenizer):
    """Fails if DPO does not use beta: at margin 0 the gradient is proportional to it."""
    monkeypatch.chdir(workdir)
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "cache"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 16}
    model = Transformer(ModelConfig(**sizes, num_attention_heads=1, num_key_value_heads=1))
    (tmp_path / "model").mkdir()
    for name, content in model_files(model.config, tokenizer).items():
        (tmp_path / "model" / name).write_text(content, encoding="utf-8")
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    words = [f"init_from={tmp_path}/model", "data.files=dpo.jsonl", "max_steps=1", "device=cpu"]
    words += ["tokens_per_step=256", "sequence_length=64", "log_every_steps=1", "precision=fp32"]
    norms = []
    for beta in (0.1, 0.4):
        assert run_stage("dpo", *words, f"beta={beta}", f"out_dir={tmp_path}/{beta}") == 0
        rows = [json.loads(line) for line in (tmp_path / f"{beta}/metrics.jsonl").open()]
        norms += [row["train/grad_norm"] for row in rows if "train/grad_norm" in row]
    assert norms[1] == pytest.approx(4 * norms[0], rel=1e-3) and norms[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
def test_pretraining_runs_with_every_key_set(workdir, length):
    tokenizer = str(ROOT / "tokenizer")
    rows = run(workdir, "pretrain", length, f"pretrain_{length}", tokenizer)
    steps = [row["step"] for row in rows if "train/loss" in row]
    if length in ("max_steps", "max_tokens"):
        assert steps[-1] == 4
    assert any("val/pretrain_val/bits_per_byte" in row for row in rows)
    assert rows[-1]["train/lr" if "train/lr" in rows[-1] else "val/loss"] > 0


@pytest.mark.slow
def test_later_stages_run_with_every_key_set(workdir):
    if not (workdir / "pretrain_max_steps").exists():
        run(workdir, "pretrain", "max_steps", "pretrain_max_steps", str(ROOT / "tokenizer"))
    run(workdir, "sft", "epochs", "sft_all", "pretrain_max_steps/final")
    rows = run(workdir, "dpo", "epochs", "dpo_all", "sft_all/final")
    assert "val/reward_accuracy" in rows[0]
