"""Tests for tools.compare_runs: what it prints about equal, different, unfinished and old runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tools.compare_runs import main
from trainlib.core.files import read_json, write_json

CONFIG = Path(__file__).resolve().parents[2] / "configs/pretrain.yaml"
MODEL = [f"model.{name}=16" for name in ("hidden_size", "intermediate_size", "head_dim")]
MODEL += [f"model.num_{n}=1" for n in ("hidden_layers", "attention_heads", "key_value_heads")]
CODE = "code:\n  commit: {}\n  clean: true\n  digest: {}\n  torch: {}\n  files:\n    model.py: {}\n"


@pytest.fixture
def runs(elsewhere, run_stage, tmp_path) -> tuple[Path, Path]:
    """Train a tiny run, and return it and a copy."""
    rows = [{"text": f"Row {i} is a text about {i}. " * 3} for i in range(60)]
    Path("text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(CONFIG), "out_dir=a", "data.files=text.jsonl", "max_steps=6", *MODEL]
    arguments += ["tokens_per_step=64", "sequence_length=32", "micro_batch_size=2", "device=cpu"]
    assert run_stage("pretrain", *arguments, "precision=fp32", "log_every_steps=1") == 0
    shutil.copytree("a", "b")
    run = tmp_path / "b/run.yaml"
    run.write_text(run.read_text().replace("out_dir: a", "out_dir: b"))
    return tmp_path / "a", tmp_path / "b"


def compare(monkeypatch, capsys, *arguments: object) -> tuple[int, dict[str, str]]:
    """Return the exit code, and what is printed about each part."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["compare_runs", *map(str, arguments)])
    code = main()
    parts: dict[str, str] = {}
    name = ""
    for line in capsys.readouterr().out.splitlines():
        name = line[:12].strip() or name
        parts[name] = f"{parts[name]}; {line[12:]}" if name in parts else line[12:]
    return code, parts


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_copy_is_equal(runs, monkeypatch, capsys):
    code, parts = compare(monkeypatch, capsys, *runs)
    assert code == 0 and "equal" in parts
    assert parts["settings"] == parts["data"] == "equal"
    assert parts["train/loss"] == "equal at 6 steps, the last is 6"
    assert parts["weights"] == "equal bit for bit"


def test_the_first_step_at_which_the_curves_part(runs, monkeypatch, capsys):
    rows = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "train/loss" in row and row["step"] >= 4:
            row["train/loss"] = 9.5 if row["step"] == 4 else None  # NaN is written as null.
    logged = [row for row in rows if row["step"] != 3]  # Another interval of logging.
    (runs[1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    code, parts = compare(monkeypatch, capsys, *runs)
    assert code == 1
    assert "part at step 4: " in parts["train/loss"] and " / 9.5, after 2" in parts["train/loss"]
    assert parts["val/loss"].startswith("equal at ")
    (runs[1] / "metrics.jsonl").write_text('{"step": 2, "train/loss": null, "train/lr": 1}')
    assert "/ nan" in compare(monkeypatch, capsys, *runs)[1]["train/loss"]


def test_settings_data_code_and_versions(runs, monkeypatch, capsys):
    for run, values in zip(runs, (("1a", "d1", "2.13.0", "f1"), ("2b", "d2", "2.14.0", "f2")),
                           strict=True):  # fmt: skip
        with (run / "run.yaml").open("a") as file:
            file.write(CODE.format(*values))
    edit(runs[1] / "run.yaml", "\n  muon_lr: 0.02 ", "\n  muon_lr: 0.01 ")
    identity = read_json(runs[1] / "identity.json")
    write_json(runs[1] / "identity.json", {**identity, "data": "other"})
    code, parts = compare(monkeypatch, capsys, *runs)
    assert code == 1 and parts["settings"] == "optim.muon_lr: 0.02 / 0.01"
    assert parts["data"] == "the data files or the tokenizer differ"
    assert parts["code"] == "model.py; commits 1a / 2b"
    assert parts["versions"] == "torch 2.13.0 / 2.14.0"
    old = compare(monkeypatch, capsys, runs[0], runs[0])[1]["code"]
    (runs[0] / "run.yaml").write_text((runs[0] / "run.yaml").read_text().split("code:")[0])
    assert old == "equal"
    assert "not recorded in A by" in compare(monkeypatch, capsys, *runs)[1]["code"]


def test_weights_and_unfinished_runs(runs, monkeypatch, capsys):
    path = runs[1] / "final/model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] += 0.25
    save_file(tensors, path, metadata={"format": "pt"})
    code, parts = compare(monkeypatch, capsys, *runs)
    assert code == 1 and parts["weights"].startswith("model.norm.weight differs by up to 0.25,")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, path, metadata={"format": "pt"})
    assert "differs by up to inf" in compare(monkeypatch, capsys, *runs)[1]["weights"]
    shutil.rmtree(runs[1] / "final")
    lines = (runs[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (runs[1] / "metrics.jsonl").write_text("".join(lines[:4]) + '{"step": 3, "tr')
    (runs[1] / "identity.json").unlink()
    (runs[0] / "identity.json").unlink()
    code, parts = compare(monkeypatch, capsys, *runs)
    assert code == 0 and "not compared" in parts["weights"]
    assert parts["train/loss"] == "equal at 3 steps, the last is 3"


def test_what_is_no_run_or_damaged(runs, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        compare(monkeypatch, capsys, runs[0], runs[0] / "tensorboard")
    assert exit_.value.code == 2 and "is not a run" in capsys.readouterr().err
    (runs[1] / "run.yaml").write_text("a: [")
    monkeypatch.setattr(sys, "argv", ["compare_runs", *map(str, runs)])
    assert main() == 1 and "run.yaml cannot be read" in capsys.readouterr().err
