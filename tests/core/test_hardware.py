"""Tests for the choice of hardware settings on each card, and for the cached measurement."""

from __future__ import annotations

import json

import pytest
import torch

from trainlib.core.errors import UserError
from trainlib.core.hardware import (
    FEW_THREADS,
    Facts,
    Hardware,
    choose_hardware,
    instructions,
    measured_precision,
    unseen_card,
)

# Capability, MiB as torch reports it, precision, compile, rows of 512 positions.
CARDS = {
    "V100 16 GB": ((7, 0), 16144, "fp16", True, 48),
    "RTX 2080 Ti": ((7, 5), 11011, "fp16", True, 32),
    "T4": ((7, 5), 14912, "fp16", True, 48),
    "A100 40 GB": ((8, 0), 40326, "bf16", True, 128),
    "RTX 3090": ((8, 6), 24126, "bf16", True, 64),
    "RTX 3060 12 GB": ((8, 6), 11907, "bf16", True, 32),
    "RTX 4090": ((8, 9), 24080, "bf16", True, 64),
    "RTX 4060": ((8, 9), 7940, "bf16", True, 16),
    "H100 80 GB": ((9, 0), 81090, "bf16", True, 128),
    "B200": ((10, 0), 182000, "bf16", True, 128),
    "RTX 5090": ((12, 0), 32120, "bf16", True, 64),
    "future card": ((15, 0), 49152, "bf16", True, 128),
}


@pytest.mark.parametrize("card", CARDS)
def test_auto_chooses_the_settings_for_each_card(card):
    capability, memory, precision, compile_, rows = CARDS[card]
    chosen = choose_hardware(Facts(cuda=capability, memory_mib=memory, varlen=True))
    attention = "varlen" if precision == "bf16" else "masked"
    assert chosen == Hardware(torch.device("cuda"), precision, attention, compile_, rows, "high")


def test_auto_chooses_a_cpu_without_a_card():
    assert choose_hardware(Facts()) == Hardware(
        torch.device("cpu"), "measure", "blocks", False, 4, "medium"
    )
    assert choose_hardware(Facts(threads=FEW_THREADS)).attention == "blocks"
    assert choose_hardware(Facts(threads=FEW_THREADS + 1)).attention == "masked"
    assert choose_hardware(Facts(amx=True)).matmul == "highest"
    mac = Facts(mps=True)
    assert choose_hardware(mac).device.type == "cpu"  # mps is used only on request.
    metal = choose_hardware(mac, device="mps")
    assert metal == Hardware(torch.device("mps"), "fp32", "masked", False, 16, "highest")


def test_settings_override_the_table():
    facts = Facts(cuda=(8, 9), memory_mib=24080, varlen=True)
    settings = {"precision": "fp32", "compile_": "off", "micro_batch_size": 3}
    chosen = choose_hardware(facts, **settings)
    assert chosen == Hardware(torch.device("cuda"), "fp32", "masked", False, 3, "high")
    assert choose_hardware(facts, device="cpu", precision="bf16").precision == "bf16"
    assert choose_hardware(facts, row_length=4096).micro_batch_size == 8
    assert choose_hardware(facts, row_length=512 * 512).micro_batch_size == 1


def test_unavailable_devices_and_precisions_are_rejected_with_a_fix():
    with pytest.raises(UserError, match="no CUDA device here. Set device=cpu"):
        choose_hardware(Facts(), device="cuda")
    with pytest.raises(UserError, match="no Metal device"):
        choose_hardware(Facts(), device="mps")
    with pytest.raises(UserError, match=r"has 7\.5\. Set precision=fp16"):
        choose_hardware(Facts(cuda=(7, 5), memory_mib=11000), precision="bf16")


def test_the_cpu_is_measured_only_once(tmp_path, monkeypatch, caplog):
    file = tmp_path / "cache" / "hardware.json"
    before = torch.get_float32_matmul_precision()
    first = measured_precision(file, "medium")
    assert first in ("fp32", "bf16") and torch.get_float32_matmul_precision() == before
    (key,) = json.loads(file.read_text())
    assert "threads" in key and torch.__version__ in key and instructions() in key
    # The value in the file is used without another measurement, so two runs agree.
    monkeypatch.setattr("trainlib.core.hardware._seconds", lambda dtype: 1 / 0)
    other = {"fp32": "bf16", "bf16": "fp32"}[first]
    file.write_text(json.dumps({key: other}))
    assert measured_precision(file, "medium") == other


def test_the_faster_precision_is_chosen_and_a_damaged_cache_is_rebuilt(tmp_path, monkeypatch):
    file = tmp_path / "hardware.json"
    for winner in ("fp32", "bf16"):
        file.write_text("{broken")
        times = {torch.float32: 1.0, torch.bfloat16: 0.5 if winner == "bf16" else 2.0}
        monkeypatch.setattr("trainlib.core.hardware._seconds", times.get)
        assert measured_precision(file, "medium") == winner


def test_a_card_that_torch_does_not_see_is_reported(tmp_path, monkeypatch):
    """A card is detected by nvidia-smi on a host, and by the profile in a container."""
    monkeypatch.delenv("GPU_PROFILE", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not unseen_card()
    monkeypatch.setenv("GPU_PROFILE", "cpu")
    assert not unseen_card()
    monkeypatch.setenv("GPU_PROFILE", "rtx40")
    assert "--force-recreate" in unseen_card()
    monkeypatch.delenv("GPU_PROFILE")
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert "the CPU only" in unseen_card() and "device=cpu" in unseen_card()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "CUDA 13.0" in unseen_card() and "torch==2.10.0" in unseen_card()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not unseen_card()
