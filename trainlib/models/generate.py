"""Text generation: prefill once, then decode token by token with a key/value cache.

Inputs and outputs are ids. Nothing here changes torch's global RNG state.
Shapes: B batch  T new positions  S positions so far  G key/value heads  H head_dim  V vocab_size.
"""

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model import ModelConfig, Transformer
from tokenizer.bpe import Tokenizer
from tokenizer.chat_format import render_prompt
from trainlib.core.settings import bound_errors

MAX_BATCH = 256  # Prompts decoded together.
MAX_POSITIONS = 1 << 16  # Positions of their cache; each takes 16 KB with the default model.


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled from the logits."""

    temperature: float = field(default=0.7, metadata={"at_least": 0, "below": math.inf})
    """Divisor of the logits; below 1e-6 = greedy."""
    top_p: float = field(default=0.9, metadata={"above": 0, "at_most": 1})
    """Keep the smallest set of most likely tokens with at least this total probability; 1 = all."""
    top_k: int = field(default=0, metadata={"at_least": 0})
    """Keep this many of the most likely tokens; 0 = all."""
    max_new_tokens: int = field(default=512, metadata={"at_least": 1})
    """Maximum number of tokens in an answer."""
    seed: int | None = None
    """Sampling seed; None = a different answer each time."""

    def __post_init__(self) -> None:
        if errors := bound_errors(self):
            raise ValueError("; ".join(errors))


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

    def select(self, rows: list[int]) -> None:
        """Keep only these rows of the batch."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.positions, self.documents = self.positions[rows], self.documents[rows]

    def extend(self, position_ids: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Store positions and documents of new keys, and return both for all keys, (B, S)."""
        end = self.length + position_ids.shape[1]
        self.positions[:, self.length : end] = position_ids
        self.documents[:, self.length : end] = document_ids
        return self.positions[:, :end], self.documents[:, :end]

    def update(self, layer: int, k_BGTH: Tensor, v_BGTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values, and return all; the last layer advances `length`."""
        end = self.length + k_BGTH.shape[2]
        self.keys[layer][:, :, self.length : end] = k_BGTH
        self.values[layer][:, :, self.length : end] = v_BGTH
        if layer == len(self.keys) - 1:
            self.length = end
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


def filter_logits(logits_V: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set all but the most likely tokens (at least one) to -inf, (V,). top_p: arXiv:1904.09751."""
    if top_k:
        kth = logits_V.topk(min(top_k, len(logits_V))).values[-1]
        logits_V = logits_V.masked_fill(logits_V < kth, -torch.inf)
    if top_p < 1:
        ordered, index = logits_V.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits_V = logits_V.index_fill(0, index[before >= top_p], -torch.inf)
    return logits_V


def sample(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> list[int]:
    """Sample one token id for each row; the most likely one at a temperature below 1e-6."""
    if sampling.temperature < 1e-6:  # Dividing by less can overflow fp32.
        return logits_BV.argmax(-1).tolist()
    rows_BV = logits_BV.float() / sampling.temperature
    filtered = (filter_logits(row_V, sampling.top_k, sampling.top_p) for row_V in rows_BV)
    return [int(row_V.softmax(-1).multinomial(1, generator=generator)) for row_V in filtered]


def seeded_generator(seed: int | None, device: torch.device) -> torch.Generator:
    """Return a generator seeded with `seed`, or nondeterministically if it is None."""
    generator = torch.Generator(device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    return generator


def generate_batch(model: Transformer, prompts: Sequence[Sequence[int]], sampling: Sampling,
                   stop_ids: Sequence[int] = (),
                   limits: Sequence[int] = ()) -> list[list[int]]:  # fmt: skip
    """Return the new ids of each prompt, up to a stop id (included) or a limit.

    `limits` replaces max_new_tokens. Greedy ids, and errors, are the same for each prompt alone.
    """
    generator = seeded_generator(sampling.seed, next(model.parameters()).device)
    answers: list[list[int]] = [[] for _ in prompts]
    limits = limits or [sampling.max_new_tokens] * len(prompts)
    # Prompts of similar length share a batch, which keeps padding low.
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), -limits[i]))
    # A compiled layer would be recompiled for each length of the cache, and fail after eight.
    # If torch's compiler, whose import takes a second, is not loaded, no layer is compiled.
    compiler = "torch._dynamo" in sys.modules
    with torch.compiler.set_stance("force_eager") if compiler else contextlib.nullcontext():
        while order:
            longest = len(prompts[order[0]]) + max(limits[i] for i in order[:MAX_BATCH])
            longest = min(longest, model.config.max_position_embeddings)
            size = max(1, min(MAX_BATCH, MAX_POSITIONS // longest))
            rows, order = order[:size], order[size:]
            some, most = [prompts[i] for i in rows], [limits[i] for i in rows]
            for new in decode(model, some, sampling, stop_ids, generator, most):
                for row, token in new.items():
                    answers[rows[row]].append(token)
    return answers


def decode(model: Transformer, prompts: Sequence[Sequence[int]], sampling: Sampling,
            stop_ids: Sequence[int], generator: torch.Generator,
            limits: Sequence[int]) -> Iterator[dict[int, int]]:  # fmt: skip
    """Yield the next id of each unfinished prompt, keyed by its row in the batch.

    Raises ValueError for a prompt that is empty or fills the model's context. Prompts are padded on
    the left, as a separate document. Example: the prompts 7 8 9 and 5 as the model sees them:

        input_ids    7 8 9     position_ids   0 1 2     document_ids   1 1 1
                     0 0 5                    0 0 0                    0 0 1
    """
    device = next(model.parameters()).device
    limit, length = model.config.max_position_embeddings, max(map(len, prompts))
    for prompt in prompts:
        if not 0 < len(prompt) < limit:
            found = f"the prompt has {len(prompt)} tokens"
            raise ValueError(f"{found}; the model takes 1 to {limit - 1}")
    remaining = {i: min(limits[i], limit - len(p)) for i, p in enumerate(prompts)}
    rows = list(remaining)  # The prompt in each row of the batch.
    padding = torch.tensor([[length - len(prompt)] for prompt in prompts], device=device)
    new_BT = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts], device=device)
    positions_BT = (torch.arange(length, device=device) - padding).clamp(min=0)
    documents_BT = (torch.arange(length, device=device) >= padding).long()
    cache = KVCache(model.config, len(prompts), length + max(remaining.values()), device)
    was_training = model.training
    model.eval()
    try:
        while remaining:
            with torch.inference_mode():
                logits = model(new_BT, positions_BT, documents_BT, cache=cache, last_only=True)
                ids = sample(logits[:, -1], sampling, generator)
                new_BT = torch.tensor(ids, device=device)[:, None]
                positions_BT, documents_BT = positions_BT[:, -1:] + 1, documents_BT[:, -1:]
            new = {row: id_ for row, id_ in zip(rows, ids, strict=True) if row in remaining}
            for row, token in new.items():
                remaining[row] -= 1
                if token in stop_ids or not remaining[row]:
                    del remaining[row]
            if 0 < len(remaining) <= 0.9 * len(rows):  # Rarely, because it copies the cache.
                kept = [i for i, row in enumerate(rows) if row in remaining]
                rows = [rows[i] for i in kept]
                cache.select(kept)
                new_BT, positions_BT, documents_BT = (
                    values[kept] for values in (new_BT, positions_BT, documents_BT)
                )
            yield new
    finally:
        model.train(was_training)


QUESTIONS = ("你是谁？", "Name three colors.")  # Answered at the evaluations of SFT and DPO.


def show_samples(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], length: int,
                 chat: bool = True) -> list[str]:  # fmt: skip
    """Return answers to prompts (continuations if not `chat`), greedy and at 0.8, with labels."""
    ids = [[tokenizer.end_of_text_id, *tokenizer.encode(prompt)] for prompt in prompts]
    if chat:
        ids = [render_prompt(tokenizer, [{"role": "user", "content": p}]) for p in prompts]
    samples, separator = [], "\n" if chat else ""
    for label, temperature in (("greedy", 0.0), ("temperature 0.8", 0.8)):
        # With a fixed seed, only the model changes from one evaluation to the next.
        sampling = Sampling(temperature, max_new_tokens=length, seed=0)
        answers = generate_batch(model, ids, sampling, tokenizer.stop_ids)
        for prompt, answer in zip(prompts, answers, strict=True):
            samples.append(f"{label}: {prompt}{separator}{tokenizer.decode(answer)}")
    return samples
