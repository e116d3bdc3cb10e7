"""Generation: prefill once, then decode token by token with a key/value cache.

Ids in, ids out. Nothing here touches torch's global random state.
Shapes: B batch  T new positions  S positions so far  G key/value heads  H head_dim  V vocab_size.
"""

from __future__ import annotations

import codecs
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model import ModelConfig, Transformer
from tokenizer.bpe import Tokenizer
from tokenizer.chat_format import render_prompt

MAX_BATCH = 32  # Prompts decoded together: 16 KB a position and prompt for the default model.


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits."""

    temperature: float = 0.7
    """Divides the logits; 0 = greedy."""
    top_p: float = 0.9
    """Least probability mass of the most likely tokens that are kept; 1 = all."""
    top_k: int = 0
    """Most tokens that are kept; 0 = all."""
    max_new_tokens: int = 512
    """Most tokens of an answer."""
    seed: int | None = None
    """Seed of the draw; none = another answer each time."""

    def __post_init__(self) -> None:
        problems = []
        if self.temperature < 0:
            problems.append(f"temperature={self.temperature} must be 0 or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k} must be 0 or more")
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if problems:
            raise ValueError("; ".join(problems))


class KVCache:
    """Keys and values of all layers, in memory allocated once for `capacity` positions."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, device: torch.device):
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        layers = config.num_hidden_layers
        self.keys = [torch.empty(shape, device=device) for _ in range(layers)]
        self.values = [torch.empty(shape, device=device) for _ in range(layers)]
        self.positions, self.documents = (
            torch.empty(batch, capacity, dtype=torch.int64, device=device) for _ in range(2)
        )
        self.length = 0

    def extend(self, position_ids: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Store positions and documents of new keys and return those of all keys, (B, S)."""
        end = self.length + position_ids.shape[1]
        self.positions[:, self.length : end] = position_ids
        self.documents[:, self.length : end] = document_ids
        return self.positions[:, :end], self.documents[:, :end]

    def update(self, layer: int, k_BGTH: Tensor, v_BGTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values and return all; `length` moves with the last layer."""
        end = self.length + k_BGTH.shape[2]
        self.keys[layer][:, :, self.length : end] = k_BGTH
        self.values[layer][:, :, self.length : end] = v_BGTH
        if layer == len(self.keys) - 1:
            self.length = end
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


def filter_logits(logits_V: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set all but the most likely tokens to -inf; the likeliest always stays.

    Shapes: (V,) -> (V,). Source of top_p: Holtzman et al., arXiv:1904.09751.
    """
    if top_k:
        kth = logits_V.topk(min(top_k, len(logits_V))).values[-1]
        logits_V = logits_V.masked_fill(logits_V < kth, -torch.inf)
    if top_p < 1:
        ordered, index = logits_V.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits_V = logits_V.index_fill(0, index[before >= top_p], -torch.inf)
    return logits_V


def sample(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token; greedy at temperature 0."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V = filter_logits(
        logits_V.float() / sampling.temperature, sampling.top_k, sampling.top_p
    )
    return int(torch.multinomial(logits_V.softmax(-1), 1, generator=generator))


def seeded_generator(seed: int | None, device: torch.device) -> torch.Generator:
    """A random state of its own, from a seed or, without one, from the system."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def check_length(model: Transformer, prompt: Sequence[int]) -> int:
    """The model's context in tokens; raises ValueError for a prompt that has no room in it."""
    limit = model.config.max_position_embeddings
    if not 0 < len(prompt) < limit:
        raise ValueError(f"a prompt of {len(prompt)} tokens; the model takes 1 to {limit - 1}")
    return limit


def generate(
    model: Transformer, ids: Sequence[int], sampling: Sampling, stop_ids: Sequence[int] = ()
) -> Iterator[int]:
    """Yield new ids until a stop id (which is the last one yielded) or a limit.

    Raises ValueError for a prompt that is empty or leaves no room in the model's context.
    """
    limit = check_length(model, ids)
    device = next(model.parameters()).device
    generator = seeded_generator(sampling.seed, device)
    length = min(limit, len(ids) + sampling.max_new_tokens)
    cache = KVCache(model.config, 1, length, device)
    was_training = model.training
    model.eval()
    try:
        new, position = list(ids), 0
        while position + len(new) <= length:
            with torch.inference_mode():
                positions = torch.arange(position, position + len(new), device=device)[None]
                inputs = torch.tensor([new], device=device)
                logits = model(inputs, positions, cache=cache, last_only=True)[0, -1]
                token = sample(logits, sampling, generator)
            position += len(new)
            if position == length:
                return
            yield token
            if token in stop_ids:
                return
            new = [token]
    finally:
        model.train(was_training)


def generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Sequence[int] = (),
) -> list[list[int]]:
    """New ids of many prompts decoded together, each up to a stop id (its last) or a limit.

    At temperature 0 the ids that `generate` yields. Raises ValueError as it does.
    """
    for prompt in prompts:
        check_length(model, prompt)
    device = next(model.parameters()).device
    generator = seeded_generator(sampling.seed, device)
    answers: list[list[int]] = [[] for _ in prompts]
    # Prompts of like length share a batch, so little of it is padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for begin in range(0, len(order), MAX_BATCH):
                rows = order[begin : begin + MAX_BATCH]
                batch = [prompts[i] for i in rows]
                new = _decode_batch(model, batch, sampling, frozenset(stop_ids), generator)
                for i, answer in zip(rows, new, strict=True):
                    answers[i] = answer
    finally:
        model.train(was_training)
    return answers


def _decode_batch(
    model: Transformer,
    prompts: list[Sequence[int]],
    sampling: Sampling,
    stop_ids: frozenset[int],
    generator: torch.Generator,
) -> list[list[int]]:
    """The new ids of prompts that end in the same column, padded in front.

    Two prompts, 7 8 9 and 5, as the model sees them (padding is a document of its own):

        input_ids    7 8 9     position_ids   0 1 2     document_ids   1 1 1
                     0 0 5                    0 0 0                    0 0 1
    """
    device = next(model.parameters()).device
    limit = model.config.max_position_embeddings
    rooms = [min(sampling.max_new_tokens, limit - len(prompt)) for prompt in prompts]
    length = max(map(len, prompts))
    padding = torch.tensor([[length - len(prompt)] for prompt in prompts], device=device)
    new_BT = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts], device=device)
    positions_BT = (torch.arange(length, device=device) - padding).clamp(min=0)
    documents_BT = (torch.arange(length, device=device) >= padding).long()
    cache = KVCache(model.config, len(prompts), length + max(rooms), device)
    logits = model(new_BT, positions_BT, documents_BT, cache=cache, last_only=True)

    answers: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))  # Finished rows are decoded on, and their ids left out.
    while True:
        ids = [sample(logits_V, sampling, generator) for logits_V in logits[:, -1]]
        for row in sorted(going):
            answers[row].append(ids[row])
            if ids[row] in stop_ids or len(answers[row]) == rooms[row]:
                going.discard(row)
        if not going:
            return answers
        positions_BT, documents_BT = positions_BT[:, -1:] + 1, documents_BT[:, -1:]
        new_BT = torch.tensor(ids, device=device)[:, None]
        logits = model(new_BT, positions_BT, documents_BT, cache=cache, last_only=True)


def sample_texts(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling
) -> list[str]:
    """Continue each text as the beginning of a document."""
    ids = [[tokenizer.end_of_text_id, *tokenizer.encode(prompt)] for prompt in prompts]
    return [
        prompt + tokenizer.decode(new)
        for prompt, new in zip(prompts, _samples(model, tokenizer, ids, sampling), strict=True)
    ]


def sample_answers(
    model: Transformer, tokenizer: Tokenizer, questions: Sequence[str], sampling: Sampling
) -> list[str]:
    """Each question with the model's answer to it, as a conversation of its own."""
    ids = [render_prompt(tokenizer, [{"role": "user", "content": q}]) for q in questions]
    return [
        f"{question}\n{tokenizer.decode(new)}"
        for question, new in zip(questions, _samples(model, tokenizer, ids, sampling), strict=True)
    ]


def _samples(
    model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], sampling: Sampling
) -> list[list[int]]:
    """What a model that may be in training, and compiled, goes on with."""
    # A compiled layer would be compiled anew for each length of the cache, and give up at eight.
    # Where torch's compiler is not even imported, which takes a second, nothing is compiled.
    compiler = "torch._dynamo" in sys.modules
    with torch.compiler.set_stance("force_eager") if compiler else contextlib.nullcontext():
        return generate_batch(model, prompts, sampling, tokenizer.stop_ids)


def stream_text(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Text of ids as they come, never half a character; broken UTF-8 becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for id_ in ids:
        if text := decoder.decode(tokenizer.decode_bytes([id_])):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest
