"""Tests that the memory formulas of --plan match a count of the tensors in a step."""

from __future__ import annotations

import pytest
import torch

import model as model_module
from bench.common import allocated_peak
from kernels import fused_cpu
from model import AttentionOp, ModelConfig, Transformer
from tests.support.hardware_table import table
from tests.support.memory_helpers import SHIPPED, shipped, stage_of
from tests.support.step_memory import make_step, peak_bytes
from trainlib.core.hardware import Hardware
from trainlib.engine.flops import Sizes
from trainlib.engine.kernels import ATTENTION
from trainlib.engine.optim import OptimConfig, build_optimizers
from trainlib.engine.plan import CUDA_BYTES, step_memory, total

SMALL = ModelConfig(1000, 64, 176, 2, 2, 1, 32)
LARGER = ModelConfig(2000, 192, 528, 4, 3, 1, 64)
KERNELS = {"rms_norm": fused_cpu.rms_norm, "rotate": fused_cpu.rotate, "swiglu": fused_cpu.swiglu}


def use_kernels(attention: str) -> None:
    """Set the kernels of an uncompiled run on a CPU."""
    vars(model_module.ops).update(KERNELS, attention=ATTENTION.get(attention, AttentionOp()))


@pytest.mark.parametrize(
    "rows, precision, attention",
    [(1, "fp32", "blocks"), (6, "fp32", "blocks"), (6, "bf16", "masked")],
)
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_formula_matches_the_counted_peak(path, rows, precision, attention, elsewhere):
    config, sizes, row_length = shipped(path)
    model = Transformer(sizes.config)
    use_kernels(attention)
    num_micro = 1 if rows == 1 else 2
    step = make_step(precision, rows, num_micro, row_length, config.optim, stage_of(path))
    counted = peak_bytes(model, config.optim, step)
    choice = Hardware(torch.device("cpu"), precision, attention, False, rows)
    terms = step_memory(sizes, config.optim.name, choice, row_length, num_micro, rows)
    assert all(term.bytes > 0 and term.reason for term in terms)
    assert total(terms) == pytest.approx(counted, rel=0.1), terms


def profiled_peak(model: torch.nn.Module, step) -> int:
    optimizers = build_optimizers(model, OptimConfig())
    return allocated_peak(model.parameters(), optimizers, lambda: step(model, optimizers))


@pytest.mark.parametrize("attention", ["masked", "blocks"])
@pytest.mark.parametrize(
    "sizes, precision, rows, num_micro", [(SMALL, "fp32", 4, 1), (LARGER, "fp32", 2, 2)]
)
def test_the_counted_peak_matches_the_allocator(sizes, precision, rows, num_micro, attention):
    step = make_step(precision, rows, num_micro, 128)
    model = Transformer(sizes)
    use_kernels(attention)
    before = {name: p.clone() for name, p in model.named_parameters()}
    counted = peak_bytes(model, OptimConfig(), step)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert counted == pytest.approx(profiled_peak(model, step), rel=0.1)


def test_a_second_micro_batch_keeps_the_gradients_of_the_first():
    one, two = (
        peak_bytes(Transformer(SMALL), OptimConfig(), make_step("fp32", 4, n, 128)) for n in (1, 2)
    )
    gradients = 4 * sum(p.numel() for p in Transformer(SMALL).parameters())
    assert gradients / 2 < two - one <= 1.1 * gradients


# ---- several cards, and the tables ---------------------------------------------------------------


def on_card(
    rows: int, num_micro: int = 1, count: int = 1, optimizer: str = "muon", row_length: int = 512
) -> dict[str, float]:
    """Return the bytes, by name, of an uncompiled step of the default model on a card."""
    choice = Hardware(torch.device("cuda"), "bf16", "varlen", False, rows)
    terms = step_memory(Sizes(ModelConfig()), optimizer, choice, row_length, num_micro, rows, count)
    return {term.name: term.bytes for term in terms}


def test_several_cards_need_a_flat_gradient_buffer():
    single, several = (on_card(1, 1, count, "adamw", 64) for count in (1, 4))
    assert "all-reduce" in several and "all-reduce" not in single
    assert several["all-reduce"] == several["gradients"] == 4 * Sizes(ModelConfig()).parameters
    # With many rows, the peak is in the loss, where the buffer does not exist yet.
    assert on_card(64, 2, 1) == on_card(64, 2, 4)


def test_the_hardware_table_has_the_right_peak_memory():
    cards = [row for row in table() if row["precision"] == "bf16"]
    assert len(cards) > 10
    for row in cards:
        gb = sum(on_card(int(row["micro_batch_size"])).values()) / 1e9
        assert gb == pytest.approx(float(row["peak_gb"]), rel=0.1), row
    (rtx40,) = [r for r in cards if r["profile"] == "rtx40" and r["typical"] == "yes"]
    assert float(rtx40["peak_gb"]) + CUDA_BYTES / 1e9 < 18
