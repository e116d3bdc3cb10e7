"""Preference pairs from a model's own mistakes, for `python -m tools.prepare_data --skill-pairs`.

The model answers questions of the training side (skills.py) at a temperature. Each complete wrong
answer becomes the rejected answer of a pair, and the right answer is chosen.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from model import Transformer
from tokenizer.bpe import Tokenizer
from tokenizer.chat_format import render_prompt
from tools.prepare_data.rows import Row, stable_hash
from tools.prepare_data.skills import KINDS, conversation, questions
from tools.prepare_data.sources import disk_errors
from trainlib.core.errors import UserError
from trainlib.core.files import write_atomically
from trainlib.data.conversations import NotUsed
from trainlib.data.formats import ReadOptions, read_row
from trainlib.data.messages import assistant
from trainlib.models.generate import Sampling, generate_batch
from trainlib.models.hf_folder import load_model, load_tokenizer

QUESTIONS = 48
"""Questions of each kind; all together take half a minute with the demo's model."""
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=64, seed=0)
FEW_PAIRS = 50
FORMAT = 2
"""Increase this when other answers become pairs, so that earlier files are not reused."""


def write_skill_pairs(folder: Path, out: Path, words: Sequence[str]) -> None:
    """Write out/dpo_skills-DIGEST.jsonl unless it exists, and print its path and size.

    DIGEST depends on the model's weights, the questions and the sampling.
    """
    model, tokenizer = load_model(folder, "--skill-pairs "), load_tokenizer(folder)
    # Direct sums would be a third of the pairs, and cannot be learned.
    asked = [(kind, *pair) for kind, entry in KINDS.items() if entry.rows and entry.think
             for pair in questions(kind, "train", QUESTIONS, words, seed="pairs")]  # fmt: skip
    digest = hashlib.sha256(f"{FORMAT} {SAMPLING} {asked}".encode())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    path = out / f"dpo_skills-{digest.hexdigest()[:12]}.jsonl"
    if not path.is_file():
        rows = list(wrong_answers(model, tokenizer, asked))
        print(f"{len(rows)} of {len(asked)} answers are complete and wrong")
        if len(rows) < FEW_PAIRS:
            print(f"fewer than {FEW_PAIRS} pairs: the model makes too few mistakes to learn from")
        if not rows:
            raise UserError(f"{folder} gave no wrong answer, so there are no pairs to write.")
        lines = sorted((row.line for row in rows), key=stable_hash)
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(line + "\n" for line in lines))
            add_to_sources(path, Counter(row.source for row in rows))
    print(path)


def add_to_sources(path: Path, rows: dict[str, int]) -> None:
    """Add a file of pairs to SOURCES.json in its folder, if any, with the packages of sft.jsonl."""
    listed = path.with_name("SOURCES.json")
    if listed.is_file():
        content = json.loads(listed.read_text(encoding="utf-8"))
        known = content["files"].get("sft.jsonl", {}).get("sources", {})
        sources = {
            name: {"rows": number, "packages": known.get(name, {}).get("packages", [])}
            for name, number in sorted(rows.items())
        }
        content["files"][path.name] = {"rows": sum(rows.values()), "sources": sources}
        write_atomically(listed, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def wrong_answers(
    model: Transformer, tokenizer: Tokenizer, asked: Sequence[tuple]
) -> Iterator[Row]:
    """Yield a pair for each question, (kind, question, item), that the model answers wrongly."""
    conversations = [conversation(kind, question, item.right) for kind, question, item in asked]
    prompts = [
        render_prompt(tokenizer, [question], answer.get("enable_thinking", True))
        for question, answer in conversations
    ]
    answers = generate_batch(model, prompts, SAMPLING, tokenizer.stop_ids)
    for (kind, _, item), chosen, ids in zip(asked, conversations, answers, strict=True):
        question, right = chosen
        wrong = assistant(tokenizer.show([id_ for id_ in ids if id_ not in tokenizer.stop_ids]))
        wrong |= {key: right[key] for key in ("enable_thinking",) if key in right}
        text = wrong["content"].strip()
        ended = ids[-1] in tokenizer.stop_ids and "<think>" not in text
        pair = {"chosen": chosen, "rejected": [question, wrong]}
        if ended and text not in ("", right["content"]) and is_readable(pair):
            yield Row(item.key, f"skill_{kind}", pair)


def is_readable(pair: dict[str, Any]) -> bool:
    """Return whether training can read a pair, which a stray tag in an answer prevents."""
    try:
        read_row(pair, "dpo", ReadOptions())
    except (ValueError, NotUsed):
        return False
    return True
