"""Protects MFU: its operations are those that torch counts, its peak disturbs nothing."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import ModelConfig, Transformer
from trainlib.engine.flops import flops_per_token, matmul_peak


@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_that_torch_counts(tied):
    config = ModelConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied,
    )  # fmt: skip
    model, length = Transformer(config), 24
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, length, dtype=torch.int64)).sum().backward()
    # The plain kernel computes the whole square of the scores: all attend to all.
    assert flops_per_token(model, length) * 2 * length == counter.get_total_flops()


def test_the_peak_is_measured_once_in_a_moment():
    state, begin = torch.get_rng_state(), time.perf_counter()
    peak = matmul_peak(torch.device("cpu"), "fp32")
    assert time.perf_counter() - begin < 3  # A quarter of a second where nobody else computes.
    assert 1e8 < peak < 1e14
    assert torch.equal(state, torch.get_rng_state())
    begin = time.perf_counter()
    assert matmul_peak(torch.device("cpu"), "fp32") == peak
    assert time.perf_counter() - begin < 0.01


def test_a_slow_first_product_does_not_count(monkeypatch):
    """As on a card, whose first product loads a library."""
    multiply, calls = torch.mm, []

    def slow_at_first(*words, **more):
        if not calls:
            time.sleep(1)
        calls.append(words[0].shape[0])
        return multiply(*words, **more)

    monkeypatch.setattr(torch, "mm", slow_at_first)
    peak = matmul_peak.__wrapped__(torch.device("cpu"), "fp32")
    assert calls.count(512) > 2 and calls[-1] > 512
    assert peak > 2 * 512**3 / 0.5
