"""Tests for MFU: operations match torch's count; measuring the peak has no side effects."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import ModelConfig, Transformer
from trainlib.engine.flops import flops_per_token, matmul_peak


@pytest.mark.parametrize("tied", [True, False])
def test_operations_match_the_count_by_torch(tied):
    config = ModelConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied,
    )  # fmt: skip
    model, length = Transformer(config), 24
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, length, dtype=torch.int64)).sum().backward()
    # The math kernel computes all scores, as if every position attended to all positions.
    assert flops_per_token(model, length) * 2 * length == counter.get_total_flops()


def test_the_peak_is_measured_once_and_quickly():
    state, begin = torch.get_rng_state(), time.perf_counter()
    peak = matmul_peak(torch.device("cpu"), "fp32")
    assert time.perf_counter() - begin < 3  # It takes 0.25 s on an idle machine.
    assert 1e8 < peak < 1e14
    assert torch.equal(state, torch.get_rng_state())
    begin = time.perf_counter()
    assert matmul_peak(torch.device("cpu"), "fp32") == peak
    assert time.perf_counter() - begin < 0.01


def test_a_slow_first_matmul_is_ignored(monkeypatch):
    """On a GPU, the first matmul loads a library."""
    multiply, calls = torch.mm, []

    def slow_at_first(*args, **kwargs):
        if not calls:
            time.sleep(1)
        calls.append(args[0].shape[0])
        return multiply(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", slow_at_first)
    peak = matmul_peak.__wrapped__(torch.device("cpu"), "fp32")
    assert calls.count(512) > 2 and calls[-1] > 512
    assert peak > 2 * 512**3 / 0.5
