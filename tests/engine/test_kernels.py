"""Tests that a run uses a kernel only if it agrees with model.py.

The varlen kernel exists only for CUDA. A CPU kernel with the same signature is registered here, so
that the real call, its autograd and its compilation are tested.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from kernels import varlen_attention
from model import AttentionOp, ModelConfig, Ops, Transformer
from trainlib.core.distributed import DistributedContext
from trainlib.core.hardware import Hardware
from trainlib.data.loader import StepBatch, StepLoader
from trainlib.engine.device import evaluation_mode
from trainlib.engine.kernels import ATTENTION, choose_kernels
from trainlib.engine.training import LONG_RUN, warm_up
from trainlib.models.generate import Sampling, generate_batch

SIZES = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=8)  # fmt: skip
CPU = torch.device("cpu")
FUSED = ("rms_norm", "rotate", "swiglu")


def forward(q, k, v, ends, ends_k, max_q, max_k, causal=False, scale=None, window=None,
            grouped=False, *rest):  # fmt: skip
    """Compute attention per document; return NaN where the real kernel writes nothing."""
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
    """Compute the gradients explicitly, because autograd does not record inside a kernel."""
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
    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward)


@pytest.fixture
def batch():
    """Return two rows of 12 positions with documents of 1 to 12, and their boundaries."""
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


def hardware(
    precision: str = "bf16", attention: str = "varlen", compile_: bool = False
) -> Hardware:
    return Hardware(CPU, precision, attention, compile_, 2)


def choose(*args: Any, row_length: int = 40) -> tuple[str, ...]:
    return choose_kernels(hardware(*args), SIZES, row_length, DistributedContext()).kernels


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("row_length", [2, 12, 40, 700])
def test_kernels_that_agree_are_used(precision, row_length, caplog):
    """Row lengths are below and above the block size and the limit for saved probabilities."""
    caplog.set_level(logging.INFO)
    assert choose(precision, "blocks", row_length=row_length) == ("blocks", *FUSED)
    assert caplog.messages == ["kernels: blocks, rms_norm, rotate, swiglu"]
    assert model_module.ops.attention == ATTENTION["blocks"]
    assert choose(precision, "masked", row_length=row_length) == FUSED
    assert model_module.ops.attention == AttentionOp()


def test_varlen_is_used_if_it_agrees(kernel):
    assert choose() == ("varlen", *FUSED)


def test_a_compiled_run_uses_the_plain_formulas():
    assert choose("fp32", "blocks", True) == ("blocks",)
    assert model_module.ops == Ops(attention=ATTENTION["blocks"])


def fails(q, k, v, boundaries):
    raise RuntimeError("no kernel image")


WRONG = {
    "fails": (fails, "RuntimeError: no kernel image"),
    "returns NaN": (lambda q, k, v, ends: v.repeat(1, 2, 1, 1) * torch.nan, "differs by nan"),
    "swaps heads": (lambda *x: varlen_attention.attend(*x).flip(1), "output differs"),
    "drops a gradient": (
        lambda q, k, v, ends: varlen_attention.attend(q, k.detach(), v, ends), "gradient of k",
    ),
    "ignores documents": (
        lambda q, k, v, ends: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        ), "output differs",
    ),
    "returns another dtype": (lambda *x: varlen_attention.attend(*x).float(), "torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_kernel_that_fails_or_disagrees_is_not_used(kernel, wrong, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    function, reason = WRONG[wrong]
    pair = AttentionOp(varlen_attention.prepare, function)
    monkeypatch.setitem(ATTENTION, "varlen", pair)
    assert choose() == FUSED and model_module.ops.attention == AttentionOp()
    assert "not used: varlen (" in caplog.text and reason in caplog.text


def test_out_of_memory_is_raised(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(ATTENTION, "varlen", AttentionOp(varlen_attention.prepare, full))
    with pytest.raises(torch.OutOfMemoryError):
        choose()


EDITS = {
    "rms_norm": lambda x, weight, eps: F.layer_norm(x, weight.shape, weight, None, eps),
    "rotate": lambda x, cos, sin: torch.cat(x.chunk(2, -1)[::-1], -1),
    "swiglu": lambda gate, up, down_weight: F.linear(F.silu(gate) * up.detach(), down_weight),
    "blocks": AttentionOp(lambda p, d, b, dtype: model_module.prepare(p, d, b, dtype) * 0),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_run_uses_an_edited_formula(name, monkeypatch, caplog):
    """Replacing a default in Ops simulates an edit in model.py."""
    caplog.set_level(logging.INFO)
    field = "attention" if name == "blocks" else name
    edited = Ops(**{field: EDITS[name]})
    monkeypatch.setattr("trainlib.engine.kernels.Ops", lambda: edited)
    chosen = choose("fp32", "blocks")
    assert set(chosen) == {"blocks", *FUSED} - {name}
    assert getattr(model_module.ops, field) is EDITS[name]
    assert f"not used: {name} (" in caplog.text and "was model.py edited?" in caplog.text


def test_all_ranks_use_the_kernels_that_all_accept(caplog):
    distributed: Any = SimpleNamespace(all_gather_object=lambda value: [value, {"rotate": "fails"}])
    found = choose_kernels(hardware("fp32", "blocks"), SIZES, 40, distributed)
    assert found.kernels == ("blocks", "rms_norm", "swiglu")


@pytest.mark.parametrize("name", ["varlen", "blocks"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_are_the_same_with_either_attention(kernel, batch, name, compiled, monkeypatch):
    gradients = []
    for attention in (AttentionOp(), ATTENTION[name]):
        monkeypatch.setattr(model_module, "ops", Ops(attention=attention))
        torch.manual_seed(2)
        model = Transformer(SIZES)
        for p in model.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.2)  # Otherwise attention would have no effect.
        if compiled:
            for layer in model.model.layers:
                layer.compile(fullgraph=True, dynamic=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(**batch)
        logits.float().square().sum().backward()
        gradients.append(torch.cat([p.grad.view(-1) for p in model.parameters()]))
    one, other = gradients
    assert not torch.equal(one, other) and not other.isnan().any()
    assert F.cosine_similarity(one, other, dim=0) > 0.999


def test_generation_does_not_use_the_kernels(monkeypatch):
    """With a cache, attention always uses the plain formulas; kernels do not support caches."""
    pair = AttentionOp(lambda *_: torch.zeros(()), fails)
    model, prompts = Transformer(SIZES), [[1, 2, 3], [4, 5, 6, 7, 8]]
    torch.nn.init.normal_(model.model.layers[0].self_attn.o_proj.weight, std=0.5)
    sampling = Sampling(temperature=0, max_new_tokens=8)
    plain = generate_batch(model, prompts, sampling)
    monkeypatch.setattr(model_module, "ops", Ops(attention=pair))
    assert generate_batch(model, prompts, sampling) == plain


def test_layers_do_not_convert_the_mask_under_autocast(batch):
    copies = []

    class RecordCopies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default:
                copies.append(tuple(out.shape))
            return out

    with torch.autocast("cpu", dtype=torch.bfloat16), RecordCopies():
        Transformer(SIZES)(**batch)
    assert copies and (2, 1, 12, 12) not in copies


def test_causal_keywords_match_each_torch_release():
    def of_2_10(q, k, v, cu, cu_k, max_q, max_k, is_causal=False): ...
    def of_2_11(q, k, v, cu, cu_k, max_q, max_k, *, window_size=(-1, -1)): ...
    def of_2_12(q, k, v, cu, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False): ...

    assert varlen_attention.keywords_of(of_2_10) == {"is_causal": True}
    assert varlen_attention.keywords_of(of_2_11) == {"window_size": (-1, 0)}
    assert varlen_attention.keywords_of(of_2_12) == {"window_size": (-1, 0), "enable_gqa": True}
    assert varlen_attention.keywords_of(varlen.varlen_attn)  # Also accepts the installed release.


def warmed_up(batch, num_steps=None, flops=0.0, choice=("bf16",), **config):
    """Return a new model after the warm-up of a run, and the hardware in use."""
    torch.manual_seed(3)
    model = Transformer(SIZES)
    micro = SimpleNamespace(inputs=batch)
    micro.to = lambda device: micro
    loader = StepLoader(SimpleNamespace(row_length=12), 24, 2)  # type: ignore[arg-type]
    loader._make = lambda position: StepBatch([micro], 24, 24, position)  # type: ignore[assignment]
    settings = SimpleNamespace(**{"kernels": "auto", "compile": "auto", **config})
    run: Any = SimpleNamespace(
        hardware=hardware(*choice), config=settings, distributed=DistributedContext()
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = warm_up(run, model, loader, num_steps, flops)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(p.grad is None for p in model.parameters())
    return model, found


def test_plain_kernels_can_be_requested(batch):
    model_module.ops.swiglu = fails  # A previous run may have set it.
    _, found = warmed_up(batch, choice=("bf16", "blocks"), kernels="plain")
    assert found.kernels == () and model_module.ops == Ops()


@pytest.mark.parametrize(
    "precision, compile_, num_steps, compiled",
    [("bf16", "auto", 1000, True), ("bf16", "auto", 999, False), ("bf16", "auto", None, False),
     ("fp32", "auto", 1000, False), ("bf16", "off", 1000, False)],
)  # fmt: skip
def test_on_a_cpu_only_long_bf16_runs_are_compiled(
    batch, precision, compile_, num_steps, compiled, monkeypatch
):
    """A step has two rows of 12 positions, so 1000 steps reach LONG_RUN and 999 do not."""
    calls = []
    monkeypatch.setattr("trainlib.engine.training.compile_layers",
                        lambda hardware, *_, **__: calls.append(1) or hardware)  # fmt: skip
    flops = LONG_RUN / 24_000
    _, found = warmed_up(batch, num_steps, flops, (precision, "blocks"), compile=compile_)
    assert found.compile == compiled == bool(calls)
    assert found.kernels == (("blocks",) if compiled else ("blocks", *FUSED))


@pytest.mark.slow
def test_warm_up_compiles_for_both_training_and_evaluation(kernel, batch):
    model, found = warmed_up(batch, choice=("bf16", "varlen", True), compile="on")
    assert found.compile and found.kernels == ("varlen",)
    torch._dynamo.config.error_on_recompile = True
    try:
        with found.autocast():
            model(**batch).float().sum().backward()
        with evaluation_mode(model), found.autocast():
            model(**batch)
    finally:
        torch._dynamo.config.error_on_recompile = False
