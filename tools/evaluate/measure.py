"""The results of one model, item by item, so that two models can be compared on the same items."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from model import Transformer, count_parameters
from tokenizer.bpe import Tokenizer
from tools.evaluate.answers import answers, held_out_prompts, repeats
from tools.evaluate.data import Data, is_pretrained, load, run_of
from trainlib.core.hardware import Hardware
from trainlib.data.packing import Datasets, PackedDataset
from trainlib.engine.device import evaluation_mode
from trainlib.evaluation import baselines
from trainlib.evaluation.preferences import (
    TIE_NATS,
    best_rule,
    pair_margins,
    share_above,
    validation_log_probs,
)
from trainlib.evaluation.skills import Question, SkillTest, answer
from trainlib.evaluation.worst_rows import sequence_totals
from trainlib.models.hf_folder import load_model, load_tokenizer

ROWS = 8
"""Rows in one forward pass."""
PROMPTS = 100
"""Maximum number of held-out prompts that are answered."""
HOT = 0.8
"""Temperature of the sampled answers."""


class Items(NamedTuple):
    """A ratio over items, such as bits per byte or right answers per question; shapes (N,)."""

    amounts: np.ndarray
    sizes: np.ndarray

    @property
    def value(self) -> float:
        """Return the ratio of the sums."""
        return float(self.amounts.sum() / self.sizes.sum())


@dataclass
class Results:
    """What was measured of one model: tables of items by section and row, and other figures."""

    path: str
    parameters: int
    bits_per_byte: dict[str, Items] = field(default_factory=dict)
    skills: dict[str, Items] = field(default_factory=dict)
    preferences: dict[str, Items] = field(default_factory=dict)
    rewards: dict[str, Items] = field(default_factory=dict)
    """Preferences relative to the model that DPO started from, as in its report."""
    answers: dict[str, Items] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    rules: dict[str, tuple[str, float]] = field(default_factory=dict)
    """The best trivial rule for each kind of pair, and its accuracy."""
    notes: list[str] = field(default_factory=list)


def shares(hits: list[Any] | np.ndarray) -> Items:
    """Return items of size 1."""
    amounts = np.asarray(hits, float)
    return Items(amounts, np.ones(len(amounts)))


def measure(folder: str, data: dict[str, Data]) -> Results:
    """Measure a model on data of several kinds; chat only if it was trained on conversations."""
    model, tokenizer = load_model(folder, "--model "), load_tokenizer(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    hardware = Hardware(device, "fp32", "masked", False, ROWS)
    results = Results(folder, count_parameters(model))
    chat = not is_pretrained(Path(folder))
    if not chat:
        note = "only pretrained: conversations, skills, preferences and answers are left out"
        results.notes.append(f"{folder}: {note}")
    context = model.config.max_position_embeddings
    loaded = {kind: load(d, kind, tokenizer, context) for kind, d in data.items()
              if chat or kind == "pretrain"}  # fmt: skip
    for kind, datasets in loaded.items():
        paths = [cache.path for packed in datasets.val.values() for cache in packed.caches]
        results.notes.append(f"{kind}: measured on {', '.join(map(str, dict.fromkeys(paths)))}")
    with evaluation_mode(model):
        for kind, datasets in loaded.items():
            if kind == "dpo":
                _add_preferences(results, hardware, model, datasets)
            else:
                _add_text(results, hardware, model, tokenizer, kind, datasets, data[kind])
        if chat:
            _add_skills(results, model, tokenizer, loaded, data)
            _add_answers(results, model, tokenizer, loaded, data)
    return results


def _sets(datasets: Datasets, desc: str) -> Iterator[tuple[str, PackedDataset]]:
    yield from tqdm(datasets.val.items(), desc=desc, unit="file", leave=False, disable=None)


def _add_text(
    results: Results, hardware: Hardware, model: Transformer, tokenizer: Tokenizer, kind: str,
    datasets: Datasets, data: Data,
) -> None:  # fmt: skip
    """Add bits per byte, perplexity and baselines of each source."""
    # Documents and conversations may come from files with the same name.
    names = {n: f"{kind}/{n}" if n in results.bits_per_byte else n for n in datasets.val}
    for name, packed in _sets(datasets, "bits per byte"):
        bits, num_bytes, labels = sequence_totals(hardware, model, packed, tokenizer)
        results.bits_per_byte[names[name]] = Items(bits, num_bytes)
        results.perplexity[names[name]] = 2 ** float(bits.sum() / labels.sum())
    if data.has_training:
        sets = {names[name]: [packed] for name, packed in datasets.val.items()}
        results.baselines.update(baselines.measure(datasets.train, sets, tokenizer))
    else:
        results.notes.append(f"no training files for {kind}, so there are no baselines")


def _add_preferences(
    results: Results, hardware: Hardware, model: Transformer, datasets: Datasets
) -> None:
    """Add the share of pairs whose chosen answer is more likely, by kind, and trivial rules."""
    reference = _reference(results.path)
    models = [model, *([] if reference is None else [reference.to(hardware.device)])]
    bar = tqdm(models, desc="preferences", unit="model", leave=False, disable=None)
    after, *rest = [validation_log_probs(hardware, m, datasets) for m in bar]
    before = rest[0] if rest else np.zeros_like(after)
    by_kind: dict[str, list[np.ndarray]] = {}
    for name, packed in datasets.val.items():
        for kind, margins in pair_margins(packed, before, after):
            by_kind.setdefault(kind or name or "pairs", []).append(margins)
    for kind, pairs in sorted(by_kind.items()):
        ratio, _, own, longer, overlap = np.array(pairs).T
        results.preferences[kind] = _preferred(own)
        results.rules[kind] = best_rule(share_above(longer), share_above(overlap))
        if reference is not None:
            results.rewards[kind] = _preferred(ratio)


def _preferred(margins: np.ndarray) -> Items:
    """Return 1 for each positive margin, and one half for ties."""
    return shares(np.where(np.abs(margins) <= TIE_NATS, 0.5, margins > 0))


def _reference(folder: str) -> Transformer | None:
    """Return the model that a DPO run started from; None if it is not there."""
    stage, settings = run_of(Path(folder))
    before = Path(settings.get("init_from") or "")
    found = stage == "dpo" and (before / "config.json").is_file()
    return load_model(before) if found else None


def _add_skills(
    results: Results, model: Transformer, tokenizer: Tokenizer, loaded: dict[str, Datasets],
    data: dict[str, Data],
) -> None:  # fmt: skip
    """Add the right answers to the questions of each kind."""
    by_name: dict[str, dict[str, Question]] = {}
    for kind in loaded.keys() & {"sft", "dpo"}:  # Both may have the same question.
        test = SkillTest(tokenizer, loaded[kind].val, data[kind].config.read_options)
        for q in test.questions:
            key = f"{q.prompt} {q.answer} {q.enable_thinking}"
            by_name.setdefault(q.name, {}).setdefault(key, q)
    total = sum(map(len, by_name.values()))
    with tqdm(total=total, desc="skills", unit="question", leave=False, disable=None) as bar:
        for name, unique in sorted(by_name.items()):
            questions = [unique[key] for key in sorted(unique)]
            pairs = zip(answer(model, tokenizer, questions), questions, strict=True)
            results.skills[name] = shares([text == q.answer for text, q in pairs])
            bar.update(len(questions))


def _add_answers(
    results: Results, model: Transformer, tokenizer: Tokenizer, loaded: dict[str, Datasets],
    data: dict[str, Data],
) -> None:  # fmt: skip
    """Add the shares of answers that repeat themselves and that end, greedy and sampled."""
    if "sft" not in loaded:
        return
    parts = [part for packed in loaded["sft"].val.values() for part in packed.parts]
    lines = {cache.path: set(cache.lines[selected].tolist()) for cache, selected in parts}
    prompts = held_out_prompts(lines, data["sft"].config.read_options)
    prompts = prompts[:: max(1, math.ceil(len(prompts) / PROMPTS))]
    for name, temperature in (("greedy", 0.0), (f"at {HOT}", HOT)):
        if found := answers(model, tokenizer, prompts, temperature):
            results.answers[f"repeat, {name}"] = shares([repeats(ids) for ids, _ in found])
            results.answers[f"end, {name}"] = shares([end for _, end in found])
