"""Tests that datasets opens the sample and TRL trains on it, with the loss mask of this project.

`make peers` runs them in .venv-peers; other environments lack TRL.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers

from model import ModelConfig
from tokenizer.chat_format import render_conversation
from trainlib.models.hf_folder import model_files

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
SAMPLE = Path(__file__).resolve().parents[2] / "dataset/sample"
LENGTH = 256
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": LENGTH,
}  # fmt: skip


@pytest.fixture
def sample(tmp_path):
    return lambda stage: datasets.load_dataset(str(SAMPLE), stage, cache_dir=str(tmp_path))


@pytest.fixture
def trained(tmp_path, tokenizer):
    """Return a function that trains a new model for four steps and returns the trainer."""

    def train(trainer_class, config_class, data, **options):
        for name, content in model_files(ModelConfig(**SIZES), tokenizer).items():
            (tmp_path / name).write_text(content, encoding="utf-8")
        torch.manual_seed(0)
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        trainer = trainer_class(
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
            args=config_class(
                str(tmp_path / "out"), max_steps=4, max_length=LENGTH, logging_steps=1, bf16=False,
                use_cpu=True, per_device_train_batch_size=2, report_to="none", **options,
            ),
            train_dataset=data["train"],
            processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path),
        )  # fmt: skip
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert len(losses) == 4 and all(map(math.isfinite, losses))
        return trainer

    return train


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_datasets_opens_every_row(sample, stage):
    files = json.loads((SAMPLE / "SOURCES.json").read_text(encoding="utf-8"))["files"]
    rows = {name: files[name]["rows"] for name in files if name.startswith(f"val/{stage}/")}
    skills = rows.pop(f"val/{stage}/skills.jsonl", 0)
    expected = {"train": files[f"{stage}.jsonl"]["rows"], "validation": sum(rows.values())}
    assert {split: len(rows) for split, rows in sample(stage).items()} == expected
    if skills:
        assert len(sample(f"{stage}_skills")["validation"]) == skills


def test_sft_trainer_has_the_same_loss_mask(sample, trained, tokenizer):
    data = sample("sft")
    trainer = trained(trl.SFTTrainer, trl.SFTConfig, data, assistant_only_loss=True)
    assert len(trainer.train_dataset) == len(data["train"])
    for theirs, row in zip(trainer.train_dataset, data["train"], strict=True):
        ours = render_conversation(tokenizer, row["messages"])
        labels = trainer.data_collator([theirs])["labels"][0]
        assert theirs["input_ids"][:LENGTH] == ours.ids[:LENGTH].tolist()
        supervised = [label != -100 for label in labels.tolist()]
        assert supervised[: len(ours.mask)] == list(ours.mask[:LENGTH])


def test_dpo_trainer_trains_on_the_pairs(sample, trained):
    trained(trl.DPOTrainer, trl.DPOConfig, sample("dpo"))
