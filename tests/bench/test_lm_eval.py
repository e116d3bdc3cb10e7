"""Test that lm_eval, which opens a model folder as it is, reports the same bits per byte.

`make peers` runs it in .venv-peers; other environments lack lm_eval.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from model import ModelConfig, Transformer
from tools.evaluate.__main__ import main
from trainlib.models.hf_folder import model_files

pytest.importorskip("lm_eval")
TASKS = Path(__file__).resolve().parents[2] / "tools/evaluate/tasks"
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
}  # fmt: skip
TEXTS = [f"第{i}条 the text of row {i}, which goes on. " * (1 + 2 * (i % 4)) for i in range(8)]


def end_bits(model, tokenizer):
    """Return the bits of the end of each document, which lm_eval does not predict."""
    bits = 0.0
    for text in TEXTS:
        ids = torch.tensor([[0, *tokenizer.encode(text)]])
        assert ids.shape[1] < SIZES["max_position_embeddings"]
        with torch.no_grad():
            bits -= float(model(ids)[0, -1].log_softmax(-1)[0]) / math.log(2)
    return bits


@pytest.mark.slow
def test_lm_eval_reports_the_same_bits_per_byte(tmp_path, monkeypatch, capsys, tokenizer):
    """All documents fit in the context; to the end of a longer one, lm_eval gives more context."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SIZES))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    (tmp_path / "model").mkdir()
    for name, content in model_files(model.config, tokenizer).items():
        (tmp_path / "model" / name).write_text(content, encoding="utf-8")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    task = yaml.safe_load((TASKS / "train_llm_text.yaml").read_text(encoding="utf-8"))
    data = tmp_path / task["dataset_kwargs"]["data_files"]["validation"]
    data.parent.mkdir(parents=True)
    rows = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
    data.write_text("".join(rows), encoding="utf-8")

    def theirs(*more):
        arguments = ",".join(["pretrained=model", "dtype=float32", *more])
        out = tmp_path / f"out{len(more)}"
        subprocess.run(
            [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments,
             "--include_path", str(TASKS), "--tasks", task["task"], "--device", "cpu",
             "--output_path", str(out)],
            check=True, cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        )  # fmt: skip
        (report,) = out.rglob("results*.json")
        return json.loads(report.read_text())["results"][task["task"]]["bits_per_byte,none"]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "cache"))
    assert main(["--model", "model", "--data", str(data), "--json"]) == 0
    (ours,) = json.loads(capsys.readouterr().out)["models"][0]["bits_per_byte"].values()
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    ours -= end_bits(model, tokenizer) / num_bytes
    assert theirs("prefix_token_id=0") == pytest.approx(ours, abs=1e-3)
    assert theirs() != pytest.approx(ours, abs=1e-3)  # The default prefix is the end of a turn.
