"""Protects each attention kernel on a card: fp64 arithmetic by hand, on packed documents."""

from __future__ import annotations

import math

import pytest
import torch

from model import AttentionOp, visible
from tests.cuda.card import LENGTH
from trainlib.core.hardware import DTYPES
from trainlib.engine.kernels import ATTENTION

pytestmark = pytest.mark.cuda


def by_hand(values, seen):
    """Return output and gradients of the sum of its squares, in fp64."""
    q, k, v = (value.clone().requires_grad_() for value in values)
    groups = q.shape[1] // k.shape[1]
    keys, content = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q @ keys.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    out = scores.softmax(-1) @ content
    out.square().sum().backward()
    return [out.detach(), *(x.grad for x in (q, k, v))]


@pytest.mark.parametrize("kernel", ["masked fp32", "varlen bf16", "blocks fp32", "masked 16 bits"])
def test_output_and_gradients_of_a_kernel(kernel, machine, report):
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
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    documents = batch.document_ids.cpu()
    # In padding all positions are 0, and kernels go by the order in a row.
    positions = torch.arange(LENGTH).expand_as(documents)
    expected = by_hand(values, visible(positions, positions, documents, documents)[:, None])
    device = torch.device(choice.device)
    function = ATTENTION.get(name, AttentionOp())
    prepared = function.prepare(positions.to(device), batch.document_ids, batch.boundaries, dtype)
    q, k, v = (value.to(device, dtype).requires_grad_() for value in values)
    out = function.attend(q, k, v, prepared)
    out.double().square().sum().backward()
    found = [out, q.grad, k.grad, v.grad]
    error = max(
        float((ours.detach().cpu().double() - theirs).abs().max() / theirs.abs().max())
        for ours, theirs in zip(found, expected, strict=True)
    )
    report(f"attention, {kernel}", f"off by {error:.1e}", f"{limit:.0e}")
    assert error < limit
