"""Tests that each attention kernel matches fp64 formulas on a GPU, on packed documents."""

from __future__ import annotations

import math

import pytest
import torch

from model import AttentionOp, visible
from tests.cuda.card import LENGTH
from trainlib.core.hardware import DTYPES
from trainlib.engine.kernels import ATTENTION

pytestmark = pytest.mark.cuda


def fp64_reference(inputs, mask):
    """Return the output and the gradients of its sum of squares, in fp64."""
    q, k, v = (x.clone().requires_grad_() for x in inputs)
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q @ keys.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    out = scores.softmax(-1) @ values
    out.square().sum().backward()
    return [out.detach(), *(x.grad for x in (q, k, v))]


@pytest.mark.parametrize("kernel", ["masked fp32", "varlen bf16", "blocks fp32", "masked 16 bits"])
def test_kernel_matches_fp64_in_output_and_gradients(kernel, machine, report):
    choice, batch = machine.choice, machine.batch(4)
    name, precision = kernel.split(" ", 1)
    if name != "masked" and name != choice.attention:
        pytest.skip(f"attention is {choice.attention} here")
    if precision == "16 bits" and choice.precision not in DTYPES:
        pytest.skip(f"precision is {choice.precision} here")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    dtype = DTYPES[choice.precision] if precision == "16 bits" else dtypes[precision]
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, heads, LENGTH, 64) for heads in (8, 4, 4)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    documents = batch.document_ids.cpu()
    # Kernels use the order within a row; position_ids are 0 in padding.
    positions = torch.arange(LENGTH).expand_as(documents)
    expected = fp64_reference(inputs, visible(positions, positions, documents, documents)[:, None])
    device = choice.device
    function = ATTENTION.get(name, AttentionOp())
    prepared = function.prepare(positions.to(device), batch.document_ids, batch.boundaries, dtype)
    q, k, v = (x.to(device, dtype).requires_grad_() for x in inputs)
    out = function.attend(q, k, v, prepared)
    out.double().square().sum().backward()
    found = [out, q.grad, k.grad, v.grad]
    error = max(
        float((a.detach().cpu().double() - b).abs().max() / b.abs().max())
        for a, b in zip(found, expected, strict=True)
    )
    report(f"attention, {kernel}", f"error {error:.1e}", f"{limit:.0e}")
    assert error < limit
