"""Model FLOPs utilization (MFU): operations per second in training, relative to the peak.

The peak is measured with matmuls, not read from a data sheet, so a throttled or shared device is
compared with itself.

Source: Chowdhery et al., PaLM, arXiv:2204.02311, appendix B.
"""

from __future__ import annotations

import functools
from collections import Counter

import torch
from torch import nn

from model import ModelConfig
from trainlib.core.hardware import DTYPES, best_time

PEAK_SECONDS = 0.25  # Approximate duration of the measurement.


def flops_per_token(model: nn.Module, context_length: float) -> float:
    """Return the floating-point operations needed to train on one token: 6 M + 12 W S.

    M    number of entries in the matrices that a token is multiplied by: every linear layer,
         including a tied output matrix; an embedding lookup needs no operations
    W    number of query values in all layers: num_hidden_layers * num_attention_heads * head_dim
    S    context_length: mean number of positions that a position attends to, including itself

    A multiply-add is two operations. Scores and weighted values take W S multiply-adds each, and
    the backward pass costs twice the forward pass: 6 = 2 * 3, 12 = 2 * 2 * 3.
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    matrices = sum(m.in_features * m.out_features for m in linear.values())
    queries = sum(m.out_features for name, m in linear.items() if name.endswith("q_proj"))
    return 6 * matrices + 12 * queries * context_length


class Sizes(ModelConfig):
    """The dimensions of a decoder, and counts computed from them without building a model."""

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Return the widths of the residual stream, queries, keys and the feed-forward layer."""
        query, key = self.num_attention_heads, self.num_key_value_heads
        return self.hidden_size, query * self.head_dim, key * self.head_dim, self.intermediate_size

    @property
    def matrices(self) -> Counter[tuple[int, int]]:
        """Return the number of matrices in the layers by shape: (outputs, inputs)."""
        d, q, k, f = self.widths
        shapes = [(q, d), (k, d), (k, d), (d, q), (f, d), (f, d), (d, f)]
        return Counter(shapes * self.num_hidden_layers)

    @property
    def matrix_values(self) -> int:
        """Return the number of values in these matrices."""
        return sum(count * rows * columns for (rows, columns), count in self.matrices.items())

    @property
    def parameters(self) -> int:
        """Return the number of trainable values, counting tied weights once."""
        d, embeddings = self.hidden_size, 1 if self.tie_word_embeddings else 2
        norms = self.num_hidden_layers * 2 * (d + self.head_dim) + d
        return self.matrix_values + embeddings * self.vocab_size * d + norms

    def flops(self, context_length: float) -> tuple[float, float]:
        """Return the operations needed to train on one token, as (matrices, attention)."""
        products = 6.0 * (self.matrix_values + self.vocab_size * self.hidden_size)
        return products, 12.0 * self.num_hidden_layers * self.widths[1] * context_length

    def update_flops(self, optimizer: str) -> float:
        """Return the operations in an update: five Newton-Schulz steps for Muon, else 0.

        For an m x n matrix (m <= n), a step is two matmuls of 2 m m n operations and one of 2 m^3.
        """
        pairs = [(*sorted(shape), count) for shape, count in self.matrices.items()]
        total = sum(count * (4.0 * m * m * n + 2.0 * m**3) for m, n, count in pairs)
        return 5 * total if optimizer == "muon" else 0.0


@functools.cache
def matmul_peak(device: torch.device, precision: str) -> float:
    """Measure the peak operations per second: the best of many square matmuls.

    Runs once per process and does not change the RNG state. Skips sizes that take too long.
    """
    dtype = DTYPES.get(precision, torch.float32)
    synchronize = getattr(torch, device.type).synchronize
    generator = torch.Generator(device).manual_seed(0)

    def seconds(size: int) -> float:
        matrix = torch.randn(size, size, device=device, generator=generator).to(dtype)
        product = torch.empty_like(matrix)

        def multiply() -> None:
            torch.mm(matrix, matrix, out=product)
            synchronize()

        return best_time(multiply, PEAK_SECONDS / 4)  # Robust on a shared device.

    seconds(512)  # Warm up: the first matmul on a card loads the library.
    best = 0.0
    for size in (512, 1024, 2048, 4096, 8192):
        fastest = seconds(size)
        best = max(best, 2 * size**3 / fastest)
        if 8 * fastest > PEAK_SECONDS:
            break
    return best
