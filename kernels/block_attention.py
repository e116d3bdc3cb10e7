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
import itertools
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
"""Queries whose scores are computed at a time: no more than BLOCK x S are held a head and row."""


def blocks_of(document_ids: Tensor) -> Iterator[tuple[slice, int, int, int, Tensor]]:
    """BLOCK queries at a time, of all rows side by side that documents divide alike.

    Gives those rows; the first position that any query of the block sees; the block's own
    positions, from begin to end; and an additive mask among these, as all that is seen before them
    is visible.
    """
    later = torch.full((BLOCK, BLOCK), -torch.inf).triu_(1)
    end_row = 0
    counts = (ids.unique_consecutive(return_counts=True)[1].tolist() for ids in document_ids)
    for sizes, alike in itertools.groupby(counts):
        rows = slice(end_row, end_row := end_row + len(list(alike)))
        for start, stop in _together(sizes):
            own = document_ids[rows.start, start:stop]  # Other ids in other rows, but as divided.
            for begin in range(start, stop, BLOCK):
                end = min(begin + BLOCK, stop)
                mask = later[: end - begin, : end - begin]
                if len(own) <= BLOCK:
                    mask = mask.masked_fill(own[:, None] != own, -torch.inf)
                yield rows, start, begin, end, mask


def _together(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Bounds of each document longer than BLOCK alone; of shorter ones as many as BLOCK holds."""
    start = stop = 0
    for size in (*sizes, BLOCK + 1):
        if stop > start and stop + size - start > BLOCK:
            yield start, stop
            start = stop
        stop += size


def _group(x_BTNH: Tensor, num_groups: int) -> Tensor:
    """What shares a key head together: (B, T, N, H) -> (B, G, T R, H)."""
    return x_BTNH.unflatten(2, (num_groups, -1)).transpose(1, 2).flatten(2, 3)


def _ungroup(x: Tensor, length: int) -> Tensor:
    """The way back, contiguous, as a compiler is told: (B, G, T R, H) -> (B, T, N, H)."""
    return x.unflatten(2, (length, -1)).transpose(1, 2).flatten(2, 3).contiguous()


def _part(x: Tensor, rows: slice, positions: slice) -> Tensor:
    """The same positions of some rows: (B, G, T R, H) -> (rows G, positions, H).

    Contiguous, else a product would copy it, and its transpose five times as slowly.
    """
    return x[rows, :, positions].flatten(0, 1).contiguous()


def _probabilities(q: Tensor, keys: Tensor, mask: Tensor, place: Tensor | None = None) -> Tensor:
    """softmax(q k) of scaled q: (rows G, T R, H), (rows G, S, H) -> (rows G, T R, S), fp32.

    Made in `place` where one is given, which must be fp32.
    """
    scores = torch.bmm(q, keys.mT, out=place)
    scores.unflatten(1, (len(mask), -1))[..., -len(mask) :] += mask[:, None]
    return torch.softmax(scores, -1, out=scores)


KEPT = 512
"""Keys that a query may see at most for its probabilities to be kept for backward.

Of rows of 512 they are a fifth of a step's memory, and spare a fifth to a third of attention's
time.
"""


def _room(q: Tensor, keep: bool) -> Tensor:
    """Room for kept probabilities: for any documents, as a compiler asks before it knows them."""
    batch, length, heads, _ = q.shape
    # A document of S <= KEPT positions keeps at most S (S + BLOCK) / 2 a head; a longer one no more
    # a position than one of KEPT.
    size = batch * heads * length * (min(length, KEPT) + BLOCK) // 2
    return q.new_empty(size if keep else 0)


def _take(room: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
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
    q, k, v are. One operator for autograd and for a compiler, so that neither looks into the loop.
    Shapes: q (B, T, N, H); k, v (B, T, G, H); document_ids (B, T), equal ones side by side ->
    (B, T, N, H) and one vector.
    Source: FlashAttention, arXiv:2205.14135, with softmax over a block's whole rows.
    """
    groups, repeats = k.shape[2], q.shape[2] // k.shape[2]
    queries, keys, values = (_group(x, groups) for x in (q, k, v))
    scaled, exact = queries.float() * q.shape[-1] ** -0.5, keys.float()
    out, kept = torch.empty_like(queries), _room(q, keep)
    room = kept
    # An operator of one's own runs under its caller's autocast, which would take scores in 16 bits.
    with torch.autocast(q.device.type, enabled=False):
        for rows, start, begin, end, mask in blocks_of(document_ids):
            here, seen = slice(repeats * begin, repeats * end), slice(start, end)
            q_, k_ = _part(scaled, rows, here), _part(exact, rows, seen)
            place = None
            if keep and end - start <= KEPT:
                place, room = _take(room, (*q_.shape[:2], end - start))
            fits = place is not None and place.dtype == torch.float32
            p = _probabilities(q_, k_, mask, place if fits else None)
            if place is not None and not fits:
                p = place.copy_(p)
            mixed = torch.bmm(p.to(v.dtype), _part(values, rows, seen))
            out[rows, :, here] = mixed.unflatten(0, (-1, groups))
    return _ungroup(out, q.shape[1]), kept


@torch.library.custom_op("train_llm::attend_blocks_backward", mutates_args=())
def attend_blocks_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v (arXiv:2205.14135, its backward pass)."""
    groups, repeats = k.shape[2], q.shape[2] // k.shape[2]
    queries, keys, values, gradients = (_group(x, groups) for x in (q, k, v, gradient))
    scale, room = q.shape[-1] ** -0.5, kept
    dq = torch.empty_like(queries)
    dk, dv = (torch.zeros_like(keys, dtype=torch.float32) for _ in range(2))
    with torch.autocast(q.device.type, enabled=False):
        for rows, start, begin, end, mask in blocks_of(document_ids):
            here, seen = slice(repeats * begin, repeats * end), slice(start, end)
            q_, do = (_part(x, rows, here) for x in (queries, gradients))
            k_, v_ = (_part(x, rows, seen) for x in (keys, values))
            if len(kept) and end - start <= KEPT:
                p, room = _take(room, (*q_.shape[:2], end - start))
            else:
                p = _probabilities(q_.float() * scale, k_.float(), mask).to(q.dtype)
            dv[rows, :, seen] += torch.bmm(p.mT, do).unflatten(0, (-1, groups))
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(do, v_.mT), p, -1, p.dtype)
            dk[rows, :, seen] += torch.bmm(ds.mT, q_).unflatten(0, (-1, groups))
            dq[rows, :, here] = torch.bmm(ds, k_).unflatten(0, (-1, groups))
    dq, dk, dv = (_ungroup(x.to(q.dtype), q.shape[1]) for x in (dq * scale, dk * scale, dv))
    return dq, dk, dv


def _like(x: Tensor) -> Tensor:
    """What a compiler is told of a result: it is contiguous."""
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
    ctx.set_materialize_grads(False)  # Else backward would be given zeros as large as `kept`.
    ctx.save_for_backward(*tensors, kept)


def _backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return (*attend_blocks_backward(gradient, *ctx.saved_tensors), None, None)


attend_blocks.register_autograd(_backward, setup_context=_save)
