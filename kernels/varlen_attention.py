"""Attention within documents with torch.nn.attention.varlen (CUDA, 16-bit, capability 8.0 and up).

Rows are concatenated, and the kernel computes no attention between documents.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def prepare(position_ids: Tensor, document_ids: Tensor, boundaries: Tensor | None,
            dtype: torch.dtype) -> Tensor:  # fmt: skip
    """Return the document boundaries in the concatenated rows, int32 (documents + 1,)."""
    if boundaries is not None:
        return boundaries
    flat = document_ids.flatten()
    edges = (flat.diff().nonzero().flatten() + 1).int()
    return torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(flat))])


def attend(q_BNTH: Tensor, k_BGTH: Tensor, v_BGTH: Tensor, boundaries: Tensor) -> Tensor:
    """Compute causal attention within the documents delimited by `boundaries`.

    The kernel needs equal 16-bit dtypes; under autocast, QK-norm gives fp32, so queries and keys
    are cast to the dtype of the values. The last boundary must be B x T: the kernel leaves outputs
    beyond it uninitialized. Shapes: q (B, N, T, H), k, v (B, G, T, H) -> (B, N, T, H).
    """
    batch, heads, length, size = q_BNTH.shape
    q, k, v = (x.to(v_BGTH.dtype).transpose(1, 2).reshape(batch * length, -1, size)
               for x in (q_BNTH, k_BGTH, v_BGTH))  # fmt: skip
    function, keywords = load()
    out: Any = function(q, k, v, boundaries, boundaries, length, length, **keywords)
    return out.view(batch, length, heads, size).transpose(1, 2)


@functools.cache
def load() -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return torch's kernel and its keyword arguments; its import takes 1.4 s, so it is late."""
    from torch.nn.attention import varlen

    return varlen.varlen_attn, keywords_of(varlen.varlen_attn)


def keywords_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments for causal grouped attention; torch 2.10, 2.11 and 2.12 differ."""
    names = inspect.signature(function).parameters
    causal = {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    return {**causal, "enable_gqa": True} if "enable_gqa" in names else causal
