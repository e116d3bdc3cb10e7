"""Protects the attention kernels beside the masked one, which they are held to.

Of varlen, which only a card has, a kernel of the same contract is registered for the CPU here, so
that the real call, its autograd and its compilation run.
"""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from generate import Sampling, generate_batch
from kernels.block_attention import (
    BLOCK,
    KEPT,
    attend,
    attend_blocks,
    attend_varlen,
    blocks_of,
    document_mask,
    load_varlen,
    varlen_keywords,
)
from model import ModelConfig, Transformer
from trainlib.batches import StepBatch, StepLoader
from trainlib.runtime import Hardware, looking, warm_up

SIZES = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=8)  # fmt: skip


def forward(q, k, v, ends, ends_k, max_q, max_k, causal=False, scale=None, window=None,
            grouped=False, *rest):  # fmt: skip
    """Document by document; NaN where none is, for there the real kernel writes nothing."""
    assert ends.dtype == torch.int32 and ends.is_contiguous() and int(ends[-1]) == len(q)
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert list(window or []) == [-1, 0] or causal
    assert grouped or q.shape[1] == k.shape[1]
    assert int(ends.diff().max()) <= max_q == max_k
    out = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
    for begin, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        if end > begin:
            document = (x[begin:end].transpose(0, 1)[None].float() for x in (q, k, v))
            answer = F.scaled_dot_product_attention(*document, is_causal=True, enable_gqa=True)
            out[begin:end] = answer[0].transpose(0, 1).to(q.dtype)
    return (
        out,
        q.new_zeros(q.shape[1], len(q), dtype=torch.float32),
        torch.zeros(2, dtype=torch.uint64),
    )


def backward(grad, q, k, v, out, lse, ends, ends_k, max_q, max_k, causal, rng, scale=None,
             window=None, *rest):  # fmt: skip
    """The same, by hand: inside a kernel autograd does not record."""
    repeats = q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    for begin, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        here = slice(begin, end)
        q_, do = (x[here].transpose(0, 1).float() for x in (q, grad))  # (N, S, H)
        k_, v_ = (x[here].transpose(0, 1).float().repeat_interleave(repeats, 0) for x in (k, v))
        scores = (q_ @ k_.mT / q.shape[-1] ** 0.5).masked_fill(
            torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1), -torch.inf
        )
        p = scores.softmax(-1)
        dp = do @ v_.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
        dq[here] = (ds @ k_).transpose(0, 1)
        for total, part in ((dk, ds.mT @ q_), (dv, p.mT @ do)):
            total[here] = part.unflatten(0, (-1, repeats)).sum(1).transpose(0, 1)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@pytest.fixture(scope="module")
def kernel():
    load_varlen()
    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward)


@pytest.fixture
def batch():
    """Two rows of 12 positions; documents of 1 to 12, and the boundaries that packing makes."""
    ids = torch.tensor([[0] * 5 + [1] + [2] * 6, [3] * 12])
    edges = np.flatnonzero(np.diff(ids.reshape(-1).numpy())) + 1
    boundaries = np.full(8, 24, np.int32)
    boundaries[0], boundaries[1 : len(edges) + 1] = 0, edges
    torch.manual_seed(0)
    position_ids = torch.cat([torch.arange(n) for n in (5, 1, 6, 12)]).view(2, 12)
    return {
        "input_ids": torch.randint(64, (2, 12)), "position_ids": position_ids,
        "document_ids": ids, "boundaries": torch.from_numpy(boundaries),
    }  # fmt: skip


def test_varlen_agrees_with_masked(kernel, batch):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, heads, 12, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    one = attend(q, k, v, document_mask(batch["document_ids"]))
    other = attend(q.float(), k.float(), v, batch["boundaries"])  # As QK-norm under autocast.
    assert other.dtype == torch.bfloat16 and not other.isnan().any()
    assert (one.float() - other.float()).abs().max() < 2e-2


@pytest.mark.parametrize("kernel_name", ["varlen", "blocks"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_learns_the_same_with_either(kernel, batch, kernel_name, compiled):
    gradients = {}
    for attention in ("masked", kernel_name):
        torch.manual_seed(2)
        model = Transformer(SIZES)
        for p in model.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.2)  # Else attention would add nothing.
        model.attention = attention
        if compiled:
            for layer in model.model.layers:
                layer.compile(fullgraph=True, dynamic=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(**batch)
        logits.float().square().sum().backward()
        gradients[attention] = torch.cat([p.grad.view(-1) for p in model.parameters()])
    one, other = gradients["masked"], gradients[kernel_name]
    assert not torch.equal(one, other) and not other.isnan().any()
    assert F.cosine_similarity(one, other, dim=0) > 0.999


# Rows of documents around the size of a block: single positions, full blocks, one more, the whole.
ROWS = {
    "one document": [[300], [300], [300]],
    "around a block": [[BLOCK, BLOCK + 1, 43], [BLOCK - 1, 1, BLOCK + 44], [300]],
    "short ones": [[1] * 3 + [50, 77, 2, 118, 50], [40] * 7 + [20], [40] * 7 + [20]],
    "long between short": [[7, 9, 260, 24], [7, 9, 260, 24], [200, 5, 5, 90]],
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [KEPT, BLOCK])
def test_blocks_give_values_and_gradients_of_exact_attention(rows, dtype, kept, monkeypatch):
    """In bf16 as near to float64 as torch's own kernel is, but for a quarter and 0.001.

    Also where the probabilities of most queries are made again in backward.
    """
    monkeypatch.setattr("kernels.block_attention.KEPT", kept)
    ids = torch.stack([
        torch.repeat_interleave(torch.arange(len(sizes)) + 50 * row, torch.tensor(sizes))
        for row, sizes in enumerate(ROWS[rows])
    ])  # fmt: skip
    mask, gradient = document_mask(ids), torch.randn(3, 6, 300, 16)
    leaves = [torch.randn(3, heads, 300, 16, dtype=dtype) for heads in (6, 2, 2)]

    def results(kind: torch.dtype, visible: torch.Tensor) -> list[torch.Tensor]:
        qkv = [x.clone().to(kind).requires_grad_() for x in leaves]
        out = attend(*qkv, visible)
        out.backward(gradient.to(dtype).to(kind))
        return [out.detach(), *(x.grad for x in qkv if x.grad is not None)]

    def errors(found: list[torch.Tensor]) -> list[float]:
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]

    exact = results(torch.float64, mask)
    plain, blocks = errors(results(dtype, mask)), errors(results(dtype, ids))
    assert len(blocks) == 4
    for own, of_torch in zip(blocks, plain, strict=True):
        assert own < (1e-6 if dtype == torch.float32 else 1.25 * of_torch + 1e-3)


def test_room_for_probabilities_is_enough_for_any_documents(monkeypatch):
    """And grows with the length, not with its square."""
    monkeypatch.setattr("kernels.block_attention.KEPT", 3 * BLOCK)
    chance, qkv = random.Random(0), torch.zeros(1, 5 * BLOCK, 1, 2)
    (room,) = attend_blocks(qkv, qkv, qkv, torch.zeros(1, 5 * BLOCK), True)[1].shape
    assert room == 5 * BLOCK * 4 * BLOCK // 2
    for _ in range(200):
        cuts = sorted(chance.choices(range(5 * BLOCK), k=chance.randint(0, 12)))
        ids = torch.bucketize(torch.arange(5 * BLOCK), torch.tensor(cuts), right=True)[None]
        blocks = ((end - begin) * (end - start) for _, start, begin, end, _ in blocks_of(ids)
                  if end - start <= 3 * BLOCK)  # fmt: skip
        assert sum(blocks) <= room


def test_probabilities_are_kept_only_where_a_backward_pass_can_follow(monkeypatch):
    qkv = [torch.randn(1, heads, 8, 4, requires_grad=True) for heads in (4, 2, 2)]
    asked = []
    monkeypatch.setattr(
        "kernels.block_attention._room", lambda q, keep: asked.append(keep) or q.new_empty(256)
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
    """Of rows that fill the room for probabilities: what is left of it would be compared too."""
    qkv = [torch.randn(2, 2 * BLOCK, heads, 4, requires_grad=True) for heads in (4, 2, 2)]
    ids = torch.arange(2)[:, None].expand(2, 2 * BLOCK).contiguous()
    for keep in (True, False):
        torch.library.opcheck(attend_blocks, (*qkv, ids, keep))


def test_under_autocast_no_layer_makes_a_mask_of_its_own(batch):
    copied = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default:
                copied.append(tuple(out.shape))
            return out

    with torch.autocast("cpu", dtype=torch.bfloat16), Copies():
        Transformer(SIZES)(**batch)
    assert copied and (2, 1, 12, 12) not in copied


def test_what_a_release_calls_causal():
    def of_2_10(q, k, v, cu, cu_k, max_q, max_k, is_causal=False): ...
    def of_2_11(q, k, v, cu, cu_k, max_q, max_k, *, window_size=(-1, -1)): ...
    def of_2_12(q, k, v, cu, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False): ...

    assert varlen_keywords(of_2_10) == {"is_causal": True}
    assert varlen_keywords(of_2_11) == {"window_size": (-1, 0)}
    assert varlen_keywords(of_2_12) == {"window_size": (-1, 0), "enable_gqa": True}
    assert varlen_keywords(varlen.varlen_attn)  # And the installed one is of a known kind.


BF16 = Hardware(torch.device("cpu"), "bf16", "varlen", False, 2)


def warmed_up(batch, hardware=BF16, **config):
    """A fresh model after the warm-up of a run, and that run."""
    torch.manual_seed(3)
    model = Transformer(SIZES)
    micro = SimpleNamespace(inputs=batch, input_ids=batch["input_ids"])
    micro.to = lambda device: micro
    loader = StepLoader(SimpleNamespace(row_length=12), 24, 2)  # type: ignore[arg-type]
    loader._make = lambda position: StepBatch([micro], 24, 24, position)  # type: ignore[assignment]
    layers = model.model.layers
    run: Any = SimpleNamespace(hardware=hardware, layers=layers, config=SimpleNamespace(**config))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    warm_up(run, model, loader)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(p.grad is None for p in model.parameters())
    return model, run


def test_a_kernel_that_agrees_is_used(kernel, batch):
    model, run = warmed_up(batch, compile="auto")
    assert model.attention == run.hardware.attention == "varlen"


def test_blocks_are_used_where_they_are_chosen(batch):
    hardware = replace(BF16, attention="blocks")
    model, run = warmed_up(batch, hardware, compile="auto")
    assert model.attention == run.hardware.attention == "blocks"


def test_generation_is_the_same_with_blocks():
    model, prompts = Transformer(SIZES), [[1, 2, 3], [4, 5, 6, 7, 8]]
    torch.nn.init.normal_(model.model.layers[0].self_attn.o_proj.weight, std=0.5)
    sampling = Sampling(temperature=0, max_new_tokens=8)
    written = []
    for kernel_name in ("masked", "blocks"):
        model.attention = kernel_name
        written.append(generate_batch(model, prompts, sampling))
    assert written[0] == written[1]


def fails(q, k, v, boundaries):
    raise RuntimeError("no kernel image")


WRONG = {
    "fails": fails,
    "gives no numbers": lambda q, k, v, boundaries: q * torch.nan,
    "swaps heads": lambda q, k, v, boundaries: attend_varlen(q, k, v, boundaries).flip(1),
    "forgets a gradient": lambda q, k, v, ends: attend_varlen(q, k.detach(), v, ends),
    "forgets documents": lambda q, k, v, boundaries: attend(q, k, v, None),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_kernel_that_fails_or_disagrees_is_left_out(kernel, batch, wrong, monkeypatch, caplog):
    """In a fresh model too, whose output does not depend on attention yet."""
    monkeypatch.setattr("kernels.block_attention.attend_varlen", WRONG[wrong])
    model, run = warmed_up(batch, compile="auto")
    assert model.attention == run.hardware.attention == "masked"
    assert "varlen kernel is left out" in caplog.text


@pytest.mark.slow
def test_what_is_compiled_before_the_first_step_serves_training_and_evaluation(kernel, batch):
    model, run = warmed_up(batch, replace(BF16, compile=True), compile="on")
    assert run.hardware.compile and run.hardware.attention == "varlen"
    torch._dynamo.config.error_on_recompile = True
    try:
        with run.hardware.autocast():
            model(**batch).float().sum().backward()
        with looking(model), run.hardware.autocast():
            model(**batch)
    finally:
        torch._dynamo.config.error_on_recompile = False
