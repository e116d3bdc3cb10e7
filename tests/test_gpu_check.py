"""Protects make gpu-check: its half for a CPU passes, and what is broken is seen."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import gpu_check
from tools.gpu_check import Machine, check_attention, check_model, check_steps, write_data
from trainlib.hardware import choose_hardware, find_facts, read_table

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def machine(elsewhere, tmp_path, tokenizer) -> Machine:
    write_data(tmp_path)
    config = gpu_check.DataConfig(files=(str(tmp_path / "pretrain.jsonl"),))
    data = gpu_check.load_datasets(config, "pretrain", tokenizer, gpu_check.LENGTH, 0).train
    choice = choose_hardware(find_facts(), read_table(), device="cpu", precision="fp32")
    yield Machine(choice, data, gpu_check.TINY, tmp_path)
    torch.set_float32_matmul_precision("highest")


def test_a_sound_machine_passes(machine):
    for check in (check_attention, check_model, check_steps):
        lines = list(check(machine))
        assert lines and all(line.fine for line in lines), lines


def test_a_wrong_kernel_is_seen(machine, monkeypatch):
    right = gpu_check.attend
    monkeypatch.setattr(gpu_check, "attend", lambda q, k, v, mask: right(q, k, v, None))
    kernels = 2 if machine.choice.attention == "blocks" else 1
    assert [line.fine for line in check_attention(machine)] == [False] * kernels


def test_wrong_numbers_are_seen(machine, monkeypatch):
    calls = []

    def wrong(model, batch):
        calls.append(1)
        loss, metrics = right(model, batch)
        return loss * 1.01 ** len(calls), metrics  # Off from one call to the next.

    right = gpu_check.loss_fn
    monkeypatch.setattr(gpu_check, "loss_fn", wrong)
    assert [line.fine for line in check_model(machine)] == [True, False, False]
    monkeypatch.setattr(gpu_check, "optimizer_step", lambda *_: math.log(-1))
    assert [line.fine for line in check_steps(machine)] == [False]


def test_a_file_without_a_table_is_not_replaced(tmp_path, monkeypatch, capsys):
    path = tmp_path / "notes.md"
    path.write_text("my notes")
    monkeypatch.setattr(gpu_check, "choose_hardware", lambda *_, **__: pytest.fail("began to work"))
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--out", str(path)])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "notes.md exists and would be lost" in capsys.readouterr().err


@pytest.mark.slow
def test_the_half_for_a_cpu(tmp_path):
    words = ["attention", "model", "steps", "stages", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu_check", *words, "--out", str(tmp_path / "table.md")],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "table.md").read_text()
    lines = 9 if "attention, blocks" in table else 8
    assert table.count("| OK |") == lines and "killed and gone on with" in table
