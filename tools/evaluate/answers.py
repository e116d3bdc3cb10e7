"""Answers to held-out prompts: whether they end, and whether they repeat themselves."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from model import Transformer
from tokenizer.bpe import Tokenizer
from tokenizer.chat_format import render_prompt
from trainlib.data.formats import ReadOptions
from trainlib.evaluation.skills import conversations, is_question
from trainlib.models.generate import Sampling, generate_batch

MAX_NEW_TOKENS = 128


def repeats(ids: list[int], size: int = 8, times: int = 3) -> bool:
    """Return whether any n-gram of `size` ids occurs at least `times` times."""
    counts: dict[tuple[int, ...], int] = {}
    for start in range(len(ids) - size + 1):
        gram = tuple(ids[start : start + size])
        counts[gram] = counts.get(gram, 0) + 1
        if counts[gram] >= times:
            return True
    return False


def held_out_prompts(
    lines: Mapping[Path, Container[int] | None], options: ReadOptions | None = None
) -> list[str]:
    """Return the first user message of each conversation in data files, without skill questions.

    `lines` has the held-out lines of each file; None = all.
    """
    prompts = []
    for path, line, row, messages in conversations(lines, options):
        held_out = lines[path]
        if not is_question(row) and (held_out is None or line in held_out):
            prompts += [m["content"] for m in messages if m["role"] == "user"][:1]
    return prompts


def answers(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], temperature: float = 0
) -> list[tuple[list[int], bool]]:
    """Return (ids, ended) for each prompt: up to MAX_NEW_TOKENS, and whether the turn ended.

    Skips prompts that do not fit in the model's context.
    """
    ids = [render_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    ids = [prompt for prompt in ids if len(prompt) < model.config.max_position_embeddings]
    sampling = Sampling(temperature, 1.0, max_new_tokens=MAX_NEW_TOKENS, seed=0)
    found = generate_batch(model, ids, sampling, tokenizer.stop_ids)
    ended = [answer[-1] in tokenizer.stop_ids for answer in found]
    return [(a[:-1] if end else a, end) for a, end in zip(found, ended, strict=True)]
