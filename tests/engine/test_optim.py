"""Tests that optimizers and schedule match references, and that every setting has an effect."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch

from model import ModelConfig, Transformer
from trainlib.core.distributed import DistributedContext
from trainlib.core.hardware import Hardware
from trainlib.core.settings import bound_errors
from trainlib.data.epoch_plan import DataPosition
from trainlib.data.loader import StepBatch
from trainlib.engine.optim import Muon, OptimConfig, Schedule, build_optimizers
from trainlib.engine.step import optimizer_step


def small_model() -> Transformer:
    """Return a model with every type of weight, all nonzero, so that weight decay changes them."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def is_matrix(name: str) -> bool:
    """Return whether a parameter is a matrix inside a block, not an embedding or a norm."""
    return "proj" in name


def test_muon_matches_torch_muon():
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
        # torch rounds the update of 0.02 to bf16, about three digits.
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)


def test_matrices_and_other_weights_have_separate_optimizers():
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


def test_schedules_have_the_right_rates_at_their_corners():
    wsd = Schedule(OptimConfig(warmup_fraction=0.1, decay_fraction=0.5), 100)
    assert [wsd.factor(s) for s in (9, 10, 49, 50)] == pytest.approx([10 / 11, 1, 1, 1])
    assert wsd.factor(75) == pytest.approx(0.5) and wsd.factor(99) == pytest.approx(0.02)
    assert not wsd.reached(99) and wsd.reached(100)
    cosine = Schedule(OptimConfig(schedule="cosine", warmup_fraction=0.0), 101)
    assert cosine.factor(1) == pytest.approx(1) and cosine.factor(51) == pytest.approx(
        0.5, abs=0.01
    )


def test_invalid_settings_are_rejected():
    wrong = OptimConfig(muon_lr=-1, momentum=2)
    assert bound_errors(wrong, "optim.") == [
        "optim.muon_lr=-1 must be above 0",
        "optim.momentum=2 must be at least 0 and below 1",
    ]
    (both,) = OptimConfig(warmup_fraction=0.6, decay_fraction=0.6).validation_errors()
    assert "must be at most 1" in both
    assert not OptimConfig(
        warmup_fraction=0.6, decay_fraction=0.6, schedule="cosine"
    ).validation_errors()


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_weight_decay_shrinks_only_the_matrices(name):
    """Fails if embeddings, the output matrix or norms decay, or if a matrix does not."""
    model = small_model()
    config = OptimConfig(name, muon_lr=0.1, adamw_lr=0.1, embedding_lr=0.3, weight_decay=0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizers = build_optimizers(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # Changes then come only from weight decay.
    for optimizer in optimizers:
        optimizer.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[n] * (0.95 if is_matrix(n) else 1.0), msg=n)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_adamw_matches_the_formula_in_the_paper(name):
    """Fails if betas are swapped or a weight has the wrong learning rate (arXiv:1711.05101)."""
    model, config = small_model(), OptimConfig(name=name, beta1=0.6, beta2=0.9)
    optimizers = build_optimizers(model, config)
    ours = {n: p for n, p in model.named_parameters() if name == "adamw" or not is_matrix(n)}
    expected = {n: p.detach().clone() for n, p in ours.items()}
    first, second = dict.fromkeys(ours, 0.0), dict.fromkeys(ours, 0.0)
    for t in (1, 2, 3):
        for n, p in ours.items():
            p.grad = torch.randn_like(p)
            first[n] = 0.6 * first[n] + 0.4 * p.grad
            second[n] = 0.9 * second[n] + 0.1 * p.grad**2
            lr = config.adamw_lr if is_matrix(n) else config.embedding_lr
            direction = (first[n] / (1 - 0.6**t)) / ((second[n] / (1 - 0.9**t)).sqrt() + 1e-8)
            expected[n] -= lr * direction
        for optimizer in optimizers:
            optimizer.step()
    for n, p in ours.items():
        torch.testing.assert_close(p.detach(), expected[n], rtol=1e-5, atol=1e-5, msg=n)


@functools.cache
def trained(config: OptimConfig) -> dict[str, torch.Tensor]:
    """Return the weights after six steps: the matrices, and the rest.

    The gradients do not depend on the weights, and their norm varies between steps. With gradients
    of equal norm, both optimizers would take the same steps with and without clipping.
    """
    model, generator = small_model(), torch.Generator().manual_seed(1)
    optimizers, schedule = build_optimizers(model, config), Schedule(config, 6)
    hardware = Hardware(torch.device("cpu"), "fp32", "masked", False, 1)
    run = SimpleNamespace(
        hardware=hardware, distributed=DistributedContext(), config=SimpleNamespace(optim=config)
    )

    def loss_fn(model, size):
        parts = [(p * torch.randn(p.shape, generator=generator)).sum() for p in model.parameters()]
        return size * torch.stack(parts).sum(), {}

    for step, size in enumerate((1.0, 0.1, 10.0, 0.1, 1.0, 10.0)):
        schedule.set_rates(optimizers, step)
        batch = StepBatch([torch.tensor(size)], 1, 1, DataPosition())
        training = SimpleNamespace(run=run, model=model, optimizers=optimizers, loss_fn=loss_fn)
        optimizer_step(training, batch, 1.0)  # type: ignore[arg-type]
    weights = {"matrices": [], "rest": []}
    for n, p in model.named_parameters():
        weights["matrices" if is_matrix(n) else "rest"].append(p.detach().flatten())
    return {group: torch.cat(values) for group, values in weights.items()}


NONE, MATRICES, REST, ALL = set(), {"matrices"}, {"rest"}, {"matrices", "rest"}
CHANGES = {
    "name": ("adamw", MATRICES, NONE), "muon_lr": (0.01, MATRICES, NONE),
    "adamw_lr": (0.01, NONE, MATRICES), "embedding_lr": (0.01, REST, REST),
    "weight_decay": (0.5, MATRICES, MATRICES), "momentum": (0.5, MATRICES, NONE),
    "beta1": (0.5, REST, ALL), "beta2": (0.5, REST, ALL), "grad_clip": (0.0, ALL, ALL),
    "schedule": ("cosine", ALL, ALL), "warmup_fraction": (0.5, ALL, ALL),
    "decay_fraction": (0.2, ALL, ALL), "final_lr_fraction": (0.5, ALL, ALL),
}  # fmt: skip
"""Another value for each setting, and the weights that it affects with muon and with adamw."""


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(OptimConfig)])
def test_every_setting_affects_the_right_weights(key, name):
    """Fails if a setting is not used, or affects other weights."""
    value, by_muon, by_adamw = CHANGES[key]
    base = OptimConfig(name=name)
    before, after = trained(base), trained(dataclasses.replace(base, **{key: value}))
    changed = {group for group in ALL if not torch.equal(before[group], after[group])}
    assert changed == (by_muon if name == "muon" else by_adamw)
    assert all(float((before[name] - after[name]).abs().max()) > 1e-3 for name in changed)


@pytest.mark.parametrize("name, peaks", [("muon", [0.1, 0.3]), ("adamw", [0.2, 0.3])])
def test_each_group_uses_its_peak_rate_times_the_factor(name, peaks):
    """Fails if a group has the wrong rate, rates accumulate, or they fall below the final one."""
    rates = {"muon_lr": 0.1, "adamw_lr": 0.2, "embedding_lr": 0.3}
    config = OptimConfig(name=name, final_lr_fraction=0.2, **rates)
    optimizers = build_optimizers(small_model(), config)
    # Halfway from 1 to 0.2, and at the end of both schedules.
    cosine = Schedule(dataclasses.replace(config, schedule="cosine"), 100)
    for schedule, step, factor in (
        (Schedule(config, 100), 75, 0.6), (Schedule(config, 100), 100, 0.2), (cosine, 100, 0.2),
    ):  # fmt: skip
        first = schedule.set_rates(optimizers, step)
        found = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        assert found == pytest.approx([factor * peak for peak in peaks]) and first == found[0]
