"""The decoder: a Qwen3-shaped transformer, written out by hand in plain PyTorch.

Differs from GPT-2: RMSNorm before each sublayer (no biases anywhere), rotary positions, grouped
key/value heads with a norm on each query and key head, SwiGLU, embeddings tied to the output.
Module and parameter names are those of `transformers.Qwen3ForCausalLM`, so a state dict of one is
a state dict of the other.

Shapes, as suffixes of local names:
    B batch  T query length  S key length  D hidden_size  N query heads  G key/value heads
    H head_dim  F intermediate_size  V vocab_size

Sources: Vaswani et al. arXiv:1706.03762; RMSNorm arXiv:1910.07467; rotary embedding
arXiv:2104.09864; SwiGLU arXiv:2002.05202; grouped queries arXiv:2305.13245; QK-norm
arXiv:2302.05442; tied embeddings arXiv:1608.05859.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from kernels.block_attention import attend, document_bias, load_varlen
from kernels.fused_cpu import rms_norm
from rotary import rotary_angles, rotate
from swiglu import gated_down


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the decoder, by their Hugging Face names."""

    vocab_size: int = 6400
    """Entries of the vocabulary."""
    hidden_size: int = 512
    """Width of the residual stream."""
    intermediate_size: int = 1408
    """Width of the SwiGLU hidden layer."""
    num_hidden_layers: int = 8
    """Transformer blocks."""
    num_attention_heads: int = 8
    """Query heads."""
    num_key_value_heads: int = 4
    """Key/value heads; each serves num_attention_heads / num_key_value_heads query heads."""
    head_dim: int = 64
    """Width of one head, even; need not be hidden_size / num_attention_heads."""
    max_position_embeddings: int = 2048
    """Longest document in tokens that the model is meant for."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square inside each norm."""
    tie_word_embeddings: bool = True
    """Use the embedding matrix as the output matrix too."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights, residual projections apart."""

    def __post_init__(self) -> None:
        problems = [
            f"model.{name}={getattr(self, name)} must be above 0"
            for name, kind in self.__annotations__.items()
            if kind != "bool" and not getattr(self, name) > 0
        ]
        if self.head_dim % 2:
            problems.append(f"model.head_dim={self.head_dim} must be even (rotary pairs)")
        if self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"model.num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"model.num_key_value_heads={self.num_key_value_heads}"
            )
        if problems:
            raise ValueError("; ".join(problems))


class Cache(Protocol):
    """What attention asks of a key/value cache (generate.KVCache is one)."""

    def update(self, layer: int, k_BGTH: Tensor, v_BGTH: Tensor) -> tuple[Tensor, Tensor]:
        """Append this step's keys and values of a layer and return all of them so far."""
        ...


class RMSNorm(nn.Module):
    """Scale to unit root mean square, then by a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention: N query heads share G key/value heads, each head normed."""

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
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        visible: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BNTH = self.q_norm(self.q_proj(x_BTD).view(heads)).transpose(1, 2)
        k_BGTH = self.k_norm(self.k_proj(x_BTD).view(heads)).transpose(1, 2)
        v_BGSH = self.v_proj(x_BTD).view(heads).transpose(1, 2)
        q_BNTH, k_BGSH = rotate(q_BNTH, *rotary), rotate(k_BGTH, *rotary)
        if cache is not None:
            k_BGSH, v_BGSH = cache.update(self.layer, k_BGSH, v_BGSH)
        out_BNTH = attend(q_BNTH, k_BGSH, v_BGSH, visible)
        return self.o_proj(out_BNTH.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return gated_down(self.gate_proj(x_BTD), self.up_proj(x_BTD), self.down_proj.weight)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        visible: Tensor | None,
        cache: Cache | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotary, visible, cache)
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
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        visible: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        rotary = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        x_BTD = self.embed_tokens(input_ids)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rotary, visible, cache)
        return self.norm(x_BTD)


class Transformer(nn.Module):
    """The language model: a decoder and the output matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self._attention = "masked"
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.init_weights()

    @property
    def attention(self) -> str:
        """Which kernel attends inside packed documents: masked, varlen or blocks (attention.py)."""
        return self._attention

    @attention.setter
    def attention(self, name: str) -> None:
        if name == "varlen":
            load_varlen()
        self._attention = name

    @torch.no_grad()
    def init_weights(self) -> None:
        """Give every parameter its initial value from torch's generator.

        ==========================  ===========================================================
        norms                       one
        o_proj, down_proj           zero: each block starts as the identity, so the first
                                    steps train the embeddings through a clear path
        everything else             normal, standard deviation config.initializer_range
        ==========================  ===========================================================
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
        mask: Tensor | None = None,
        cache: Cache | None = None,
        select: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits of the next token at each position, or where `select` says.

        Without document_ids (and without a mask of one's own) a row is one document. Boundaries
        say what document_ids say, for the varlen kernel.

        Shapes: input_ids, position_ids, document_ids (B, T), boundaries int32 (documents + 1,) ->
        (B, T, vocab_size), or (B, 1, vocab_size) with last_only; mask bool (B, 1, T, S), True =
        attend; select bool (B, T) -> (selected, vocab_size).
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
            position_ids = position_ids.expand_as(input_ids)
        if self.attention == "blocks" and document_ids is not None:
            mask = document_ids
        elif self.attention == "varlen" and boundaries is not None:
            mask = boundaries
        elif document_ids is not None:
            mask = document_bias(document_ids, self.lm_head.weight.dtype)
        hidden_BTD = self.model(input_ids, position_ids, mask, cache)
        if select is not None:
            hidden_BTD = hidden_BTD[select]
        return self.lm_head(hidden_BTD[:, -1:] if last_only else hidden_BTD)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable values, tied ones once."""
    return sum(p.numel() for p in model.parameters())
