"""Tests that block-wise attention equals exact attention with model.visible."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.block_attention import BLOCK, MAX_SAVED_KEYS, attend, attend_blocks, blocks_of
from model import attend as plain_attend
from model import attention_bias

# Document lengths in a row, around the size of a block: 1, a block, one more or less, a full row.
ROWS = {
    "one document": [[300], [300], [300]],
    "around a block": [[BLOCK, BLOCK + 1, 43], [BLOCK - 1, 1, BLOCK + 44], [300]],
    "short documents": [[1] * 3 + [50, 77, 2, 118, 50], [40] * 7 + [20], [40] * 7 + [20]],
    "long between short": [[7, 9, 260, 24], [7, 9, 260, 24], [200, 5, 5, 90]],
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_saved_keys", [MAX_SAVED_KEYS, BLOCK])
def test_values_and_gradients_equal_exact_attention(rows, dtype, max_saved_keys, monkeypatch):
    """In bf16, the error relative to float64 is at most 1.25 times torch's error plus 0.001.

    With max_saved_keys=BLOCK, backward recomputes the probabilities of most queries.
    """
    monkeypatch.setattr("kernels.block_attention.MAX_SAVED_KEYS", max_saved_keys)
    ids = torch.stack([
        torch.repeat_interleave(torch.arange(len(sizes)) + 50 * row, torch.tensor(sizes))
        for row, sizes in enumerate(ROWS[rows])
    ])  # fmt: skip
    gradient, positions = torch.randn(3, 6, 300, 16), torch.arange(300).expand(3, -1)
    leaves = [torch.randn(3, heads, 300, 16, dtype=dtype) for heads in (6, 2, 2)]

    def results(compute_dtype: torch.dtype, blocks: bool) -> list[torch.Tensor]:
        qkv = [x.clone().to(compute_dtype).requires_grad_() for x in leaves]
        bias = attention_bias(positions, positions, ids, ids, compute_dtype)
        out = attend(*qkv, ids) if blocks else plain_attend(*qkv, bias)
        out.backward(gradient.to(dtype).to(compute_dtype))
        return [out.detach(), *(x.grad for x in qkv if x.grad is not None)]

    def errors(tensors: list[torch.Tensor]) -> list[float]:
        return [float((a - b).norm() / b.norm()) for a, b in zip(tensors, exact, strict=True)]

    exact = results(torch.float64, False)
    plain, blocks = errors(results(dtype, False)), errors(results(dtype, True))
    assert len(blocks) == 4
    for ours, torchs in zip(blocks, plain, strict=True):
        assert ours < (1e-6 if dtype == torch.float32 else 1.25 * torchs + 1e-3)


def test_the_probability_buffer_is_large_enough_for_any_documents(monkeypatch):
    """The size grows linearly with the length, not quadratically."""
    monkeypatch.setattr("kernels.block_attention.MAX_SAVED_KEYS", 3 * BLOCK)
    rng, qkv = random.Random(0), torch.zeros(1, 5 * BLOCK, 1, 2)
    (size,) = attend_blocks(qkv, qkv, qkv, torch.zeros(1, 5 * BLOCK), True)[1].shape
    assert size == 5 * BLOCK * 4 * BLOCK // 2
    for _ in range(200):
        cuts = sorted(rng.choices(range(5 * BLOCK), k=rng.randint(0, 12)))
        ids = torch.bucketize(torch.arange(5 * BLOCK), torch.tensor(cuts), right=True)[None]
        blocks = ((end - begin) * (end - start) for _, start, begin, end, _ in blocks_of(ids)
                  if end - start <= 3 * BLOCK)  # fmt: skip
        assert sum(blocks) <= size


def test_probabilities_are_saved_only_if_a_backward_pass_can_follow(monkeypatch):
    qkv = [torch.randn(1, heads, 8, 4, requires_grad=True) for heads in (4, 2, 2)]
    saves = []
    monkeypatch.setattr(
        "kernels.block_attention._saved_buffer",
        lambda q, save: saves.append(save) or q.new_empty(256),
    )
    ids = torch.zeros(1, 8, dtype=torch.int64)
    attend(*qkv, ids)
    with torch.no_grad():
        attend(*qkv, ids)
    assert saves == [True, False]


def test_autocast_does_not_affect_block_attention():
    ids = torch.tensor([[0] * 4 + [1] * 5, [2] * 9])
    qkv = [4 * torch.randn(2, heads, 9, 8, dtype=torch.bfloat16) for heads in (4, 2, 2)]
    expected = attend(*qkv, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attend(*qkv, ids), expected)
        # QK-norm may return fp32, but attention is in the dtype of the values.
        assert attend(qkv[0].float(), qkv[1].float(), qkv[2], ids).dtype == torch.bfloat16


def test_attend_blocks_passes_torch_opcheck():
    """The rows fill the buffer, because opcheck would also compare uninitialized values."""
    qkv = [torch.randn(2, 2 * BLOCK, heads, 4, requires_grad=True) for heads in (4, 2, 2)]
    ids = torch.arange(2)[:, None].expand(2, 2 * BLOCK).contiguous()
    for save in (True, False):
        torch.library.opcheck(attend_blocks, (*qkv, ids, save))
