"""Protects attention in blocks, which is held to exact attention under model.visible."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.block_attention import BLOCK, MAX_SAVED_KEYS, attend, attend_blocks, blocks_of
from model import attend as plain_attend
from model import attention_bias

# Rows of documents around the size of a block: single positions, full blocks, one more, the whole.
ROWS = {
    "one document": [[300], [300], [300]],
    "around a block": [[BLOCK, BLOCK + 1, 43], [BLOCK - 1, 1, BLOCK + 44], [300]],
    "short ones": [[1] * 3 + [50, 77, 2, 118, 50], [40] * 7 + [20], [40] * 7 + [20]],
    "long between short": [[7, 9, 260, 24], [7, 9, 260, 24], [200, 5, 5, 90]],
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [MAX_SAVED_KEYS, BLOCK])
def test_values_and_gradients_are_those_of_exact_attention(rows, dtype, most, monkeypatch):
    """In bf16 the error against float64 is at most 1.25 times that of torch's kernel, plus 0.001.

    Also where backward recomputes the probabilities of most queries.
    """
    monkeypatch.setattr("kernels.block_attention.MAX_SAVED_KEYS", most)
    ids = torch.stack([
        torch.repeat_interleave(torch.arange(len(sizes)) + 50 * row, torch.tensor(sizes))
        for row, sizes in enumerate(ROWS[rows])
    ])  # fmt: skip
    gradient, positions = torch.randn(3, 6, 300, 16), torch.arange(300).expand(3, -1)
    leaves = [torch.randn(3, heads, 300, 16, dtype=dtype) for heads in (6, 2, 2)]

    def results(kind: torch.dtype, blocks: bool) -> list[torch.Tensor]:
        qkv = [x.clone().to(kind).requires_grad_() for x in leaves]
        bias = attention_bias(positions, positions, ids, ids, kind)
        out = attend(*qkv, ids) if blocks else plain_attend(*qkv, bias)
        out.backward(gradient.to(dtype).to(kind))
        return [out.detach(), *(x.grad for x in qkv if x.grad is not None)]

    def errors(found: list[torch.Tensor]) -> list[float]:
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]

    exact = results(torch.float64, False)
    plain, blocks = errors(results(dtype, False)), errors(results(dtype, True))
    assert len(blocks) == 4
    for own, of_torch in zip(blocks, plain, strict=True):
        assert own < (1e-6 if dtype == torch.float32 else 1.25 * of_torch + 1e-3)


def test_the_buffer_of_probabilities_is_large_enough_for_any_documents(monkeypatch):
    """It grows with the length, not with its square."""
    monkeypatch.setattr("kernels.block_attention.MAX_SAVED_KEYS", 3 * BLOCK)
    chance, qkv = random.Random(0), torch.zeros(1, 5 * BLOCK, 1, 2)
    (size,) = attend_blocks(qkv, qkv, qkv, torch.zeros(1, 5 * BLOCK), True)[1].shape
    assert size == 5 * BLOCK * 4 * BLOCK // 2
    for _ in range(200):
        cuts = sorted(chance.choices(range(5 * BLOCK), k=chance.randint(0, 12)))
        ids = torch.bucketize(torch.arange(5 * BLOCK), torch.tensor(cuts), right=True)[None]
        blocks = ((end - begin) * (end - start) for _, start, begin, end, _ in blocks_of(ids)
                  if end - start <= 3 * BLOCK)  # fmt: skip
        assert sum(blocks) <= size


def test_probabilities_are_saved_only_where_a_backward_pass_can_follow(monkeypatch):
    qkv = [torch.randn(1, heads, 8, 4, requires_grad=True) for heads in (4, 2, 2)]
    asked = []
    monkeypatch.setattr(
        "kernels.block_attention._saved_buffer",
        lambda q, save: asked.append(save) or q.new_empty(256),
    )
    ids = torch.zeros(1, 8, dtype=torch.int64)
    attend(*qkv, ids)
    with torch.no_grad():
        attend(*qkv, ids)
    assert asked == [True, False]


def test_autocast_does_not_reach_into_blocks():
    ids = torch.tensor([[0] * 4 + [1] * 5, [2] * 9])
    qkv = [4 * torch.randn(2, heads, 9, 8, dtype=torch.bfloat16) for heads in (4, 2, 2)]
    expected = attend(*qkv, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attend(*qkv, ids), expected)
        # QK-norm may give fp32, and attention is in the values' dtype.
        assert attend(qkv[0].float(), qkv[1].float(), qkv[2], ids).dtype == torch.bfloat16


def test_blocks_are_an_operator_as_torch_checks_them():
    """With rows that fill the buffer: what is left of it would be compared too."""
    qkv = [torch.randn(2, 2 * BLOCK, heads, 4, requires_grad=True) for heads in (4, 2, 2)]
    ids = torch.arange(2)[:, None].expand(2, 2 * BLOCK).contiguous()
    for save in (True, False):
        torch.library.opcheck(attend_blocks, (*qkv, ids, save))
