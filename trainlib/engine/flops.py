"""Model FLOPs utilization (MFU): operations per second in training, relative to the peak.

The peak is measured with matmuls, so that a throttled or shared device is compared with itself.

Source: Chowdhery et al., PaLM, arXiv:2204.02311, appendix B.
"""

import functools

import torch
from torch import nn

from model import ModelConfig, Transformer, count_parameters
from trainlib.core.hardware import DTYPES, best_time
from trainlib.engine.optim import block_matrices
from trainlib.models.hf_folder import SkipRandomInit

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


class Sizes:
    """Counts over a decoder of some dimensions, from a model without weights."""

    def __init__(self, config: ModelConfig) -> None:
        with torch.device("meta"), SkipRandomInit():
            model = Transformer(config)
        self.config, self.parameters = config, count_parameters(model)
        self.matrices = [(p.shape[0], p.shape[1]) for p in block_matrices(model)]  # (out, in)
        self.matrix_values = sum(rows * columns for rows, columns in self.matrices)
        # Operations to train on one token: in matrices; in attention, per position of context.
        self.products = flops_per_token(model, 0)
        self.attention = flops_per_token(model, 1) - self.products

    def update_flops(self, optimizer: str) -> float:
        """Return the operations in an update: five Newton-Schulz steps for Muon, else 0."""
        # For an m x n matrix (m <= n), a step is two matmuls of 2 m m n operations, one of 2 m^3.
        shapes = [sorted(shape) for shape in self.matrices if optimizer == "muon"]
        return 5 * sum(4.0 * m * m * n + 2.0 * m**3 for m, n in shapes)


@functools.cache
def matmul_peak(device: torch.device, precision: str) -> float:
    """Measure the peak operations per second: the best of many square matmuls, once per process."""
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
