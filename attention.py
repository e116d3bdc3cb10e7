"""Causal attention inside documents that share a row, by one of two kernels.

masked   scaled_dot_product_attention under a mask of positions: on every device
varlen   torch.nn.attention.varlen: a kernel that computes nothing outside the documents; on CUDA
         from compute capability 8.0 on, in 16-bit numbers

Both take what a query may see as one argument: nothing (the row is one document), a mask
(B, 1, T, S), True or 0 where it may, or the documents' boundaries, int32 (N + 1,).
Shapes as in model.py: B batch  T query length  S key length  N query heads  G key/value heads
H head_dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
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


def attend(q_BNTH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, visible: Tensor | None) -> Tensor:
    """Scaled dot-product attention with grouped key/value heads; causal where nothing is given."""
    if visible is not None and visible.dtype == torch.int32:
        return attend_varlen(q_BNTH, k_BGSH, v_BGSH, visible)
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
