"""Protects the optimizers and the schedule: Muon equals torch's, the curve has its corners."""

from __future__ import annotations

import pytest
import torch

from model import ModelConfig, Transformer
from trainlib.optim import Muon, OptimConfig, Schedule, build_optimizers


def test_muon_equals_torch_muon():
    torch.manual_seed(0)
    shapes = [(16, 16), (32, 16), (16, 32), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "original"}
    a, b = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        # torch rounds the direction to bf16: three digits of an update of 0.02.
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)


def test_matrices_and_the_rest_are_apart():
    config = ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = Transformer(config)
    muon, adamw = build_optimizers(model, OptimConfig())
    names = {p: n for n, p in model.named_parameters()}
    in_muon = {names[p] for g in muon.param_groups for p in g["params"]}
    in_adamw = {names[p] for g in adamw.param_groups for p in g["params"]}
    assert len(in_muon) == 14 and all("proj" in name for name in in_muon)
    assert in_muon | in_adamw == set(names.values()) and not in_muon & in_adamw
    assert len(build_optimizers(model, OptimConfig(name="adamw"))) == 1


def test_schedule_corners():
    wsd = Schedule(OptimConfig(warmup_fraction=0.1, decay_fraction=0.5), 100)
    assert [wsd.factor(s) for s in (9, 10, 49, 50)] == pytest.approx([10 / 11, 1, 1, 1])
    assert wsd.factor(75) == pytest.approx(0.5) and wsd.factor(99) == pytest.approx(0.02)
    assert not wsd.reached(99) and wsd.reached(100)
    cosine = Schedule(OptimConfig(schedule="cosine", warmup_fraction=0.0), 101)
    assert cosine.factor(1) == pytest.approx(1) and cosine.factor(51) == pytest.approx(
        0.5, abs=0.01
    )


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match=r"muon_lr=-1.*momentum=2"):
        OptimConfig(muon_lr=-1, momentum=2)
