"""Causal attention inside documents that share a row, by one of three kernels.

masked   scaled_dot_product_attention under a mask of positions: on every device
varlen   torch.nn.attention.varlen: a kernel that computes nothing outside the documents; on CUDA
         from compute capability 8.0 on, in 16-bit numbers
blocks   the same idea in plain products, written out below: on a CPU of few cores

All take what a query may see as one argument, whose dtype chooses the kernel: nothing (the row is
one document); a mask (B, 1, T, S), True or 0 where it may (masked); the documents' boundaries,
int32 (N + 1,) (varlen); each position's document, int64 (B, T) (blocks).
Shapes as in model.py: B batch  T query length  S key length  N query heads  G key/value heads
R = N / G  H head_dim.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

varlen: Any = None
"""torch's module, once load_varlen has imported it."""
VARLEN_KEYWORDS: dict[str, Any] = {}
"""How its kernel says "causal" and "grouped"."""


def document_mask(document_ids: Tensor) -> Tensor:
    """Which positions may see which: earlier ones of the same document, and themselves.

    Three documents in a row of six positions (1 = may attend):

        ids 0 0 0 1 1 2      1 . . . . .
                             1 1 . . . .
                             1 1 1 . . .
                             . . . 1 . .
                             . . . 1 1 .
                             . . . . . 1

    Shapes: document_ids (B, T) -> bool (B, 1, T, T).
    """
    same_BTT = document_ids[:, :, None] == document_ids[:, None, :]
    return same_BTT.tril()[:, None]


def document_bias(document_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """document_mask as what is added to scores: 0 or -inf, (B, 1, T, T).

    In numbers of the queries' dtype, autocast's or the weights': of another each layer would make,
    and keep, its own.
    """
    device = document_ids.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    zero = document_ids.new_zeros((), dtype=dtype)
    return zero.where(document_mask(document_ids), -torch.inf)


def attend(q_BNTH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, visible: Tensor | None) -> Tensor:
    """Scaled dot-product attention with grouped key/value heads; causal where nothing is given."""
    if visible is not None and visible.dtype == torch.int32:
        return attend_varlen(q_BNTH, k_BGSH, v_BGSH, visible)
    if visible is not None and visible.dtype == torch.int64:
        q_BTNH, k_BTGH, v_BTGH = (
            x.to(v_BGSH.dtype).transpose(1, 2) for x in (q_BNTH, k_BGSH, v_BGSH)
        )
        keep = torch.is_grad_enabled()
        return attend_blocks(q_BTNH, k_BTGH, v_BTGH, visible, keep)[0].transpose(1, 2)
    grouped = k_BGSH.shape[1] != q_BNTH.shape[1]
    if grouped and visible is not None and q_BNTH.is_cuda:
        # On CUDA a mask together with enable_gqa falls back to the quadratic-memory kernel.
        repeats = q_BNTH.shape[1] // k_BGSH.shape[1]
        k_BGSH, v_BGSH = (x.repeat_interleave(repeats, dim=1) for x in (k_BGSH, v_BGSH))
        grouped = False
    # is_causal aligns to the first key: right for a whole sequence, wrong for one new token.
    causal = visible is None and q_BNTH.shape[2] > 1
    return F.scaled_dot_product_attention(
        q_BNTH, k_BGSH, v_BGSH, attn_mask=visible, is_causal=causal, enable_gqa=grouped
    )


def varlen_keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """How a torch release says "causal" and "grouped": 2.10, 2.11 and 2.12 differ in both."""
    names = inspect.signature(function).parameters
    causal = {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    return {**causal, "enable_gqa": True} if "enable_gqa" in names else causal


def load_varlen() -> None:
    """Import torch's kernel: apart, as it brings torch's compiler along, 1.4 s of every start.

    Raises ImportError for a build of torch without it.
    """
    global varlen
    from torch.nn.attention import varlen

    VARLEN_KEYWORDS.update(varlen_keywords(varlen.varlen_attn))


def attend_varlen(q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor, boundaries: Tensor) -> Tensor:
    """The same, of rows laid end to end, whose documents begin and end at `boundaries`.

    The kernel asks for equal 16-bit dtypes; under autocast the QK-norm gives fp32, so queries and
    keys are cast to the values' dtype. The last boundary must be B x T: what lies beyond would be
    left uninitialised.
    """
    batch, heads, length, size = q_BNTH.shape
    q, k, v = (
        x.to(v_BGTH.dtype).transpose(1, 2).reshape(batch * length, -1, size)
        for x in (q_BNTH, k_BGTH, v_BGTH)
    )
    ends = (boundaries, boundaries, length, length)
    out: Any = varlen.varlen_attn(q, k, v, *ends, **VARLEN_KEYWORDS)
    return out.view(batch, length, heads, size).transpose(1, 2)


# ---- blocks: few queries at a time, and the keys of their own document alone --------------------

BLOCK = 128
"""Queries whose scores are computed at a time, so that no more than BLOCK x S are held a head."""


def blocks_of(document_ids: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """Each document longer than BLOCK alone; of shorter ones as many as BLOCK holds together.

    Gives row, positions and the additive mask of the last square of a block's scores; the keys
    before that square are all visible.
    """
    later = torch.full((BLOCK, BLOCK), -torch.inf).triu_(1)
    for row, ids in enumerate(document_ids):
        begin = end = 0
        for size in (*ids.unique_consecutive(return_counts=True)[1].tolist(), BLOCK + 1):
            if end > begin and end + size - begin > BLOCK:
                own = ids[begin:end]
                yield row, slice(begin, end), later if end - begin > BLOCK else _among(own, later)
                begin = end
            end += size


def _among(ids: Tensor, later: Tensor) -> Tensor:
    """The mask of short documents side by side."""
    size = len(ids)
    return later[:size, :size].masked_fill(ids[:, None] != ids, -torch.inf)


def _group(x_TNH: Tensor, num_groups: int) -> Tensor:
    """The queries of a key head below each other: (T, N, H) -> (G, R T, H)."""
    return x_TNH.unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _ungroup(x: Tensor, length: int) -> Tensor:
    """The way back: (G, R T, H) -> (T, N, H)."""
    return x.unflatten(1, (-1, length)).permute(2, 0, 1, 3).flatten(1, 2)


def _probabilities(q: Tensor, keys: Tensor, length: int, mask: Tensor) -> Tensor:
    """softmax(q k / sqrt(H)) in fp32: (G, R T, H), (G, S, H) -> (G, R T, S)."""
    # An operator of one's own runs under its caller's autocast, which would take scores in 16 bits.
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.bmm(q.float() * q.shape[-1] ** -0.5, keys.float().mT)
    scores.unflatten(1, (-1, length))[..., -length:] += mask[:length, :length]
    return torch.softmax(scores, -1, out=scores)


KEPT = 512
"""Keys that a query may see at most for its probabilities to be kept for backward."""


def _room(q: Tensor, keep: bool) -> Tensor:
    """Where they are kept; of all ways to fill a row, documents of KEPT positions take most."""
    batch, length, heads, _ = q.shape
    size = batch * heads * length * (min(length, KEPT) + BLOCK) // 2
    return q.new_empty(size if keep else 0)


def _next(room: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The place of one block's probabilities, and the room after it."""
    size = math.prod(shape)
    return room[:size].view(shape), room[size:]


@torch.library.custom_op("train_llm::attend_blocks", mutates_args=())
def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """Attention, and where `keep` says so the probabilities that its backward pass needs.

    Those of queries that see more than KEPT keys are made again there, so that memory does not
    grow with the square of the length. Scores and softmax are in fp32, whatever autocast says and
    q, k, v are. One operator for autograd and for a compiler, so that neither looks into the loops.
    Shapes: q (B, T, N, H); k, v (B, T, G, H); document_ids (B, T), equal ones side by side ->
    (B, T, N, H) and one vector.
    Source: FlashAttention, arXiv:2205.14135, with softmax over a block's whole rows.
    """
    out, kept, num_groups = _like(q), _room(q, keep), k.shape[2]
    room = kept
    for row, here, mask in blocks_of(document_ids):
        keys, values = (x[row, here].transpose(0, 1).contiguous() for x in (k, v))
        keys = keys.float()
        for begin in range(here.start, here.stop, BLOCK):
            end = min(begin + BLOCK, here.stop)
            seen = end - here.start
            grouped = _group(q[row, begin:end], num_groups)
            p = _probabilities(grouped, keys[:, :seen], end - begin, mask)
            if keep and seen <= KEPT:
                place, room = _next(room, p.shape)
                p = place.copy_(p)
            mixed = torch.bmm(p.to(v.dtype), values[:, :seen])
            out[row, begin:end] = _ungroup(mixed, end - begin)
    return out, kept


@torch.library.custom_op("train_llm::attend_blocks_backward", mutates_args=())
def attend_blocks_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v (arXiv:2205.14135, its backward pass)."""
    (dq, dk, dv), num_groups = map(_like, (q, k, v)), k.shape[2]
    room, scale = kept, q.shape[-1] ** -0.5
    for row, here, mask in blocks_of(document_ids):
        keys, values = (x[row, here].transpose(0, 1).contiguous() for x in (k, v))
        sum_k, sum_v = (torch.zeros_like(keys, dtype=torch.float32) for _ in range(2))
        for begin in range(here.start, here.stop, BLOCK):
            end = min(begin + BLOCK, here.stop)
            seen = end - here.start
            grouped, do = (_group(x[row, begin:end], num_groups) for x in (q, gradient))
            if seen <= KEPT:
                p, room = _next(room, (*grouped.shape[:2], seen))
            else:
                p = _probabilities(grouped, keys[:, :seen], end - begin, mask).to(q.dtype)
            sum_v[:, :seen] += torch.bmm(p.mT, do)
            dp = torch.bmm(do, values[:, :seen].mT)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, dp.dtype)
            mixed = torch.bmm(ds, keys[:, :seen])
            torch.mul(_ungroup(mixed, end - begin), scale, out=dq[row, begin:end])
            sum_k[:, :seen] += torch.bmm(ds.mT, grouped)
        dk[row, here], dv[row, here] = (x.transpose(0, 1) for x in (sum_k.mul_(scale), sum_v))
    return dq, dk, dv


def _like(x: Tensor) -> Tensor:
    """Room for a result: contiguous, as a compiler is told."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@attend_blocks.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return _like(q), _room(q, keep)


@attend_blocks_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _ = inputs
    kept = output[1]
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, kept)


def _backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return (*attend_blocks_backward(gradient, *ctx.saved_tensors), None, None)


attend_blocks.register_autograd(_backward, setup_context=_save)
