"""The reference decoder: a transformer with the architecture of Qwen3 in plain PyTorch.

Differences from GPT-2: RMSNorm before each sublayer (no biases anywhere), rotary positions, grouped
key/value heads with a norm on each query and key head, SwiGLU, embeddings tied to the output.
Names are those of `transformers.Qwen3ForCausalLM`, so state dicts are interchangeable.

Shape suffixes in local names:
    B batch  T query length  S key length  D hidden_size  N query heads  G key/value heads
    H head_dim  F intermediate_size  V vocab_size

Sources: Vaswani et al. arXiv:1706.03762; RMSNorm arXiv:1910.07467; rotary embedding
arXiv:2104.09864; SwiGLU arXiv:2002.05202; grouped queries arXiv:2305.13245; QK-norm
arXiv:2302.05442; tied embeddings arXiv:1608.05859.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of the decoder, with their Hugging Face names."""

    vocab_size: int = field(default=6400, metadata={"above": 0})
    """Number of entries in the vocabulary."""
    hidden_size: int = field(default=512, metadata={"above": 0})
    """Width of the residual stream."""
    intermediate_size: int = field(default=1408, metadata={"above": 0})
    """Width of the SwiGLU hidden layer."""
    num_hidden_layers: int = field(default=8, metadata={"above": 0})
    """Number of transformer blocks."""
    num_attention_heads: int = field(default=8, metadata={"above": 0})
    """Number of query heads."""
    num_key_value_heads: int = field(default=4, metadata={"above": 0})
    """Key/value heads; each is shared by num_attention_heads / num_key_value_heads query heads."""
    head_dim: int = field(default=64, metadata={"above": 0})
    """Width of one head; must be even, but need not be hidden_size / num_attention_heads."""
    max_position_embeddings: int = field(default=2048, metadata={"above": 0})
    """Maximum length of a document in tokens."""
    rope_theta: float = field(default=10000.0, metadata={"above": 0})
    """Base of the rotary wavelengths."""
    rms_norm_eps: float = field(default=1e-6, metadata={"above": 0})
    """Value added to the mean square in each norm."""
    tie_word_embeddings: bool = True
    """Share the embedding matrix with the output layer."""
    initializer_range: float = field(default=0.02, metadata={"above": 0})
    """Standard deviation of the initial weights; residual projections start at zero."""

    def validation_errors(self) -> list[str]:
        """Return one message for each invalid combination of dimensions."""
        errors = []
        if self.head_dim % 2:
            errors.append(f"model.head_dim={self.head_dim} must be even (rotary pairs)")
        if self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads:
            errors.append(
                f"model.num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"model.num_key_value_heads={self.num_key_value_heads}"
            )
        return errors


# ---- formulas ------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 or wider.

    Shapes: x (..., D), weight (D,) -> (..., D). Source: arXiv:1910.07467, equation 4.
    """
    dtype = torch.promote_types(x.dtype, weight.dtype)
    wide = x.to(torch.promote_types(dtype, torch.float32))
    mean_square = wide.square().mean(-1, keepdim=True)
    return (wide * torch.rsqrt(mean_square + eps) * weight).to(dtype)


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of the rotary angles, always in fp32.

    Shapes: position_ids (B, T) -> two tensors (B, 1, T, head_dim / 2), shared by all heads.
    Source: arXiv:2104.09864, equation 15.
    """
    pairs = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    inverse_frequency = theta ** (-pairs / head_dim)
    angles = position_ids[:, None, :, None].float() * inverse_frequency
    return angles.cos(), angles.sin()


def rotate(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + H/2) in a head by its position's angle (Hugging Face order)."""
    first, second = x_BNTH.chunk(2, dim=-1)
    cos, sin = cos.to(x_BNTH.dtype), sin.to(x_BNTH.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def swiglu(gate: Tensor, up: Tensor, down_weight: Tensor) -> Tensor:
    """Return (silu(gate) * up) down_weight^T. Source: arXiv:2002.05202, equation 6.

    Shapes: gate, up (..., F), down_weight (D, F) -> (..., D).
    """
    return F.linear(F.silu(gate) * up, down_weight)


def visible(
    query_positions: Tensor, key_positions: Tensor, query_documents: Tensor, key_documents: Tensor
) -> Tensor:
    """Return which keys each query may attend to, in training and in generation.

    A query attends to the keys of its own document up to its own position. Three documents in a row
    of six positions (1 = may attend):

        document_ids  0 0 0 1 1 2      1 . . . . .
        position_ids  0 1 2 0 1 0      1 1 . . . .
                                       1 1 1 . . .
                                       . . . 1 . .
                                       . . . 1 1 .
                                       . . . . . 1

    Shapes: positions and documents of queries (B, T), of keys (B, S) -> bool (B, T, S).
    """
    same_document = query_documents[:, :, None] == key_documents[:, None, :]
    return same_document & (query_positions[:, :, None] >= key_positions[:, None, :])


def attention_bias(
    query_positions: Tensor, key_positions: Tensor, query_documents: Tensor,
    key_documents: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the bias for attention scores, (B, 1, T, S): 0 where visible, else -inf."""
    seen = visible(query_positions, key_positions, query_documents, key_documents)
    zero = torch.zeros((), dtype=dtype, device=seen.device)
    return torch.where(seen, zero, -torch.inf)[:, None]


def prepare(
    position_ids: Tensor, document_ids: Tensor, boundaries: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the attention bias for a batch without a cache; all layers share it."""
    return attention_bias(position_ids, position_ids, document_ids, document_ids, dtype)


def attend(q_BNTH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, bias: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(H) + bias) v; N / G query heads share a key/value head.

    Source: arXiv:1706.03762, equation 1. Shapes: bias (B, 1, T, S) -> (B, N, T, H).
    """
    grouped = k_BGSH.shape[1] != q_BNTH.shape[1]
    if grouped and q_BNTH.is_cuda:
        # On CUDA, a mask with enable_gqa falls back to the kernel with quadratic memory.
        repeats = q_BNTH.shape[1] // k_BGSH.shape[1]
        k_BGSH, v_BGSH = (x.repeat_interleave(repeats, dim=1) for x in (k_BGSH, v_BGSH))
        grouped = False
    return F.scaled_dot_product_attention(q_BNTH, k_BGSH, v_BGSH, bias, enable_gqa=grouped)


# ---- functions that compute the formulas ---------------------------------------------------------


class AttentionOp(NamedTuple):
    """The functions prepare, which is called once per forward pass, and attend."""

    prepare: Callable[[Tensor, Tensor, Tensor | None, torch.dtype], Tensor] = prepare
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = attend


@dataclass
class Ops:
    """The functions that the modules call: the formulas above, unless a run replaces them.

    Before a run uses a kernel, it compares the kernel with the formula. Therefore, if you edit a
    formula, the run uses your version (see trainlib/engine/kernels.py).
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = rotate
    swiglu: Callable[[Tensor, Tensor, Tensor], Tensor] = swiglu
    attention: AttentionOp = AttentionOp()


ops = Ops()


class Cache(Protocol):
    """Interface of a key/value cache (trainlib.models.generate.KVCache implements it)."""

    def extend(self, position_ids: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Append the positions and documents of new keys; return them for all keys, (B, S)."""
        ...

    def update(self, layer: int, k_BGTH: Tensor, v_BGTH: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new keys and values of a layer; return all of them, (B, G, S, H)."""
        ...


# ---- modules -------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Scale to unit root mean square, then by a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention: N query heads share G key/value heads, with a norm on q and k."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], prepared: Tensor, cache: Cache | None
    ) -> Tensor:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BNTH = self.q_norm(self.q_proj(x_BTD).view(heads)).transpose(1, 2)
        k_BGTH = self.k_norm(self.k_proj(x_BTD).view(heads)).transpose(1, 2)
        v_BGSH = self.v_proj(x_BTD).view(heads).transpose(1, 2)
        q_BNTH, k_BGSH = ops.rotate(q_BNTH, *rotary), ops.rotate(k_BGTH, *rotary)
        if cache is None:
            out_BNTH = ops.attention.attend(q_BNTH, k_BGSH, v_BGSH, prepared)
        else:
            out_BNTH = attend(q_BNTH, *cache.update(self.layer, k_BGSH, v_BGSH), prepared)
        return self.o_proj(out_BNTH.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return ops.swiglu(self.gate_proj(x_BTD), self.up_proj(x_BTD), self.down_proj.weight)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], prepared: Tensor, cache: Cache | None
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotary, prepared, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: token ids in, hidden states out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, prepared: Tensor, cache: Cache | None
    ) -> Tensor:
        rotary = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        x_BTD = self.embed_tokens(input_ids)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rotary, prepared, cache)
        return self.norm(x_BTD)


class Transformer(nn.Module):
    """The language model: decoder and output layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize all parameters with the default random generator.

        Norms are one. o_proj and down_proj are zero: each block starts as the identity, so in the
        first steps gradients reach the embeddings unchanged. All others are normal, with standard
        deviation config.initializer_range.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
            else:
                parameter.normal_(std=self.config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        boundaries: Tensor | None = None,
        *,
        cache: Cache | None = None,
        select: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Return the next-token logits at each position, or only where `select` is True.

        Without document_ids, a row is one document. `boundaries` contains the same information as
        document_ids, in the format that the varlen kernel needs.

        Shapes: input_ids, position_ids, document_ids (B, T), boundaries int32 (documents + 1,) ->
        (B, T, V), or (B, 1, V) with last_only; select bool (B, T) -> (selected, V).
        """
        if position_ids is None:
            position_ids = torch.ones_like(input_ids).cumsum(-1) - 1
        if document_ids is None:
            document_ids = torch.zeros_like(input_ids)
        # If the bias and the queries had different dtypes, each layer would convert the bias.
        device, dtype = input_ids.device.type, self.lm_head.weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if cache is None:
            prepared = ops.attention.prepare(position_ids, document_ids, boundaries, dtype)
        else:
            keys = cache.extend(position_ids, document_ids)
            prepared = attention_bias(position_ids, keys[0], document_ids, keys[1], dtype)
        hidden_BTD = self.model(input_ids, position_ids, prepared, cache)
        if select is not None:
            hidden_BTD = hidden_BTD[select]
        return self.lm_head(hidden_BTD[:, -1:] if last_only else hidden_BTD)


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable values, counting tied weights once."""
    return sum(p.numel() for p in model.parameters())
