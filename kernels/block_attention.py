"""Block-wise attention within documents using matmuls, fast on CPUs with few cores.

Nothing is computed between documents that share a row; a masked kernel computes the full row.
The results equal those of model.attend with model.visible up to rounding.

Shapes have the suffixes of model.py; R = N / G query heads share a key/value head.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def prepare(position_ids: Tensor, document_ids: Tensor, boundaries: Tensor | None,
            dtype: torch.dtype) -> Tensor:  # fmt: skip
    """Return what attend needs from a packed batch: the document ids, (B, T)."""
    return document_ids


def attend(q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor, document_ids: Tensor) -> Tensor:
    """Compute causal attention within documents, in the dtype of the values.

    Under autocast, QK-norm gives fp32 queries and keys; they are cast to that dtype first.
    Shapes: q (B, N, T, H), k, v (B, G, T, H), document_ids (B, T) -> (B, N, T, H).
    """
    q_BTNH, k_BTGH, v_BTGH = (x.to(v_BGTH.dtype).transpose(1, 2) for x in (q_BNTH, k_BGTH, v_BGTH))
    save = torch.is_grad_enabled()
    return attend_blocks(q_BTNH, k_BTGH, v_BTGH, document_ids, save)[0].transpose(1, 2)


BLOCK = 128  # Number of queries at a time: at most BLOCK x S scores per head and row.


def blocks_of(document_ids: Tensor) -> Iterator[tuple[slice, int, int, int, Tensor]]:
    """Yield (rows, start, begin, end, mask) for every block of at most BLOCK queries.

    `rows` are neighboring rows with equal document lengths, `start` is the first position that any
    query of the block sees, and the queries are at positions begin to end. The additive mask
    covers these positions; keys from start to begin are visible to all queries.
    """
    future = torch.full((BLOCK, BLOCK), -torch.inf).triu_(1)
    end_row = 0
    counts = (row.unique_consecutive(return_counts=True)[1].tolist() for row in document_ids)
    for sizes, group in itertools.groupby(counts):
        rows = slice(end_row, end_row := end_row + len(list(group)))
        for start, stop in _group_bounds(sizes):
            ids = document_ids[rows.start, start:stop]  # Other rows have equal boundaries.
            for begin in range(start, stop, BLOCK):
                end = min(begin + BLOCK, stop)
                mask = future[: end - begin, : end - begin]
                if len(ids) <= BLOCK:
                    mask = mask.masked_fill(ids[:, None] != ids, -torch.inf)
                yield rows, start, begin, end, mask


def _group_bounds(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the bounds of each long document, and of groups of shorter ones that fit in BLOCK."""
    start = stop = 0
    for size in (*sizes, BLOCK + 1):
        if stop > start and stop + size - start > BLOCK:
            yield start, stop
            start = stop
        stop += size


def _group(x_BTNH: Tensor, num_groups: int) -> Tensor:
    """Group queries that share a key head: (B, T, N, H) -> (B, G, T R, H)."""
    return x_BTNH.unflatten(2, (num_groups, -1)).transpose(1, 2).flatten(2, 3)


def _ungroup(x: Tensor, length: int) -> Tensor:
    """Undo _group, contiguous as register_fake promises: (B, G, T R, H) -> (B, T, N, H)."""
    return x.unflatten(2, (length, -1)).transpose(1, 2).flatten(2, 3).contiguous()


def _part(x: Tensor, rows: slice, positions: slice) -> Tensor:
    """Select positions of rows: (B, G, T R, H) -> (rows G, positions, H)."""
    # Contiguous: bmm would copy it anyway, and its transpose five times more slowly.
    return x[rows, :, positions].flatten(0, 1).contiguous()


def _probabilities(q: Tensor, keys: Tensor, mask: Tensor, slot: Tensor | None = None) -> Tensor:
    """Return softmax(q k), (rows G, T R, S), of scaled q in fp32; written to `slot` if given."""
    scores = torch.bmm(q, keys.mT, out=slot)
    scores.unflatten(1, (len(mask), -1))[..., -len(mask) :] += mask[:, None]
    return torch.softmax(scores, -1, out=scores)


MAX_SAVED_KEYS = 512
"""Probabilities are saved for backward if a query sees at most this many keys.

At 512 positions, they take a fifth of the memory and save a fifth to a third of attention time.
"""


def _saved_buffer(q: Tensor, save: bool) -> Tensor:
    """Return a buffer for probabilities; a compiler needs its size before documents are known."""
    batch, length, heads, _ = q.shape
    # A document of S <= MAX_SAVED_KEYS positions saves at most S (S + BLOCK) / 2 values per head; a
    # longer one saves no more per position than one of MAX_SAVED_KEYS.
    size = batch * heads * length * (min(length, MAX_SAVED_KEYS) + BLOCK) // 2
    return q.new_empty(size if save else 0)


def _next_slice(buffer: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    size = math.prod(shape)
    return buffer[:size].view(shape), buffer[size:]


@torch.library.custom_op("train_llm::attend_blocks", mutates_args=())
def attend_blocks(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor,
                  save: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return attention and, if `save` is set, the probabilities that its backward pass needs.

    Backward recomputes them for queries that see more than MAX_SAVED_KEYS keys, so memory does not
    grow with the square of the length. Scores and softmax are in fp32 for every dtype of q, k, v.
    This is one operator for autograd and for a compiler, so neither traces the loop.
    Shapes: q (B, T, N, H); k, v (B, T, G, H); document_ids (B, T), with equal ids contiguous ->
    (B, T, N, H) and a vector.
    Source: FlashAttention, arXiv:2205.14135, but with softmax over full rows of a block.
    """
    groups, repeats = k.shape[2], q.shape[2] // k.shape[2]
    queries, keys, values = (_group(x, groups) for x in (q, k, v))
    scaled, exact = queries.float() * q.shape[-1] ** -0.5, keys.float()
    out, saved = torch.empty_like(queries), _saved_buffer(q, save)
    buffer = saved
    # A custom operator inherits its caller's autocast, which would compute scores in 16 bits.
    with torch.autocast(q.device.type, enabled=False):
        for rows, start, begin, end, mask in blocks_of(document_ids):
            query_span, key_span = slice(repeats * begin, repeats * end), slice(start, end)
            q_, k_ = _part(scaled, rows, query_span), _part(exact, rows, key_span)
            slot = None
            if save and end - start <= MAX_SAVED_KEYS:
                slot, buffer = _next_slice(buffer, (*q_.shape[:2], end - start))
            fits = slot is not None and slot.dtype == torch.float32
            p = _probabilities(q_, k_, mask, slot if fits else None)
            if slot is not None and not fits:
                p = slot.copy_(p)
            mixed = torch.bmm(p.to(v.dtype), _part(values, rows, key_span))
            out[rows, :, query_span] = mixed.unflatten(0, (-1, groups))
    return _ungroup(out, q.shape[1]), saved


@torch.library.custom_op("train_llm::attend_blocks_backward", mutates_args=())
def attend_blocks_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor,
                           saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v, as in the backward pass of arXiv:2205.14135."""
    groups, repeats = k.shape[2], q.shape[2] // k.shape[2]
    queries, keys, values, gradients = (_group(x, groups) for x in (q, k, v, gradient))
    scale, buffer = q.shape[-1] ** -0.5, saved
    dq = torch.empty_like(queries)
    dk, dv = (torch.zeros_like(keys, dtype=torch.float32) for _ in range(2))
    with torch.autocast(q.device.type, enabled=False):
        for rows, start, begin, end, mask in blocks_of(document_ids):
            query_span, key_span = slice(repeats * begin, repeats * end), slice(start, end)
            q_, do = (_part(x, rows, query_span) for x in (queries, gradients))
            k_, v_ = (_part(x, rows, key_span) for x in (keys, values))
            if len(saved) and end - start <= MAX_SAVED_KEYS:
                p, buffer = _next_slice(buffer, (*q_.shape[:2], end - start))
            else:
                p = _probabilities(q_.float() * scale, k_.float(), mask).to(q.dtype)
            dv[rows, :, key_span] += torch.bmm(p.mT, do).unflatten(0, (-1, groups))
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(do, v_.mT), p, -1, p.dtype)
            dk[rows, :, key_span] += torch.bmm(ds.mT, q_).unflatten(0, (-1, groups))
            dq[rows, :, query_span] = torch.bmm(ds, k_).unflatten(0, (-1, groups))
    dq, dk, dv = (_ungroup(x.to(q.dtype), q.shape[1]) for x in (dq * scale, dk * scale, dv))
    return dq, dk, dv


def _like(x: Tensor) -> Tensor:
    """Return an empty contiguous tensor like `x`, as register_fake promises the compiler."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@attend_blocks.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    return _like(q), _saved_buffer(q, save)


@attend_blocks_backward.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor,
      saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _like(q), _like(k), _like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # Otherwise backward gets zeros as large as `saved`.
    ctx.save_for_backward(*inputs[:-1], output[1])


def _backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return (*attend_blocks_backward(gradient, *ctx.saved_tensors), None, None)


attend_blocks.register_autograd(_backward, setup_context=_save)
