"""Adaptation of other tokenizers for training from scratch.

Any lossless tokenizer.json is accepted: byte-level BPE (GPT-2, Llama 3, Qwen), and BPE or Unigram
with byte fallback (SentencePiece, Llama 2). It is modified so that encoding a text in pieces and
concatenating the ids gives a valid encoding of the whole text. Checkpoints store the result.

    special tokens   missing REQUIRED_TOKENS are added after the last id; others are kept but unused
                     tags are never parsed in text, and no token removes the spaces around it
    start of text    no space is prepended, and no tokens are added by a post-processor
    length           no truncation, no padding, no BPE dropout
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from tokenizer.bpe import REQUIRED_TOKENS, SPECIAL_TOKENS, Tokenizer, load_bpe, read_json

Node = dict[str, Any]


def adopt(folder: str | Path) -> Tokenizer:
    """Return a folder's tokenizer with these changes; raises ValueError if it is not lossless."""
    path = Path(folder) / "tokenizer.json"
    text = read_json(path)
    values: Node = json.loads(text)
    changed = _adapted(values)
    special = {token["content"] for token in changed["added_tokens"] if token["special"]}
    if changed == values and special.issuperset(REQUIRED_TOKENS):
        return Tokenizer(folder)
    bpe = load_bpe(json.dumps(changed, ensure_ascii=False), path)
    bpe.add_special_tokens([AddedToken(token, special=True) for token in REQUIRED_TOKENS])
    return Tokenizer(folder, bpe.to_str())


def _adapted(values: Node) -> Node:
    changed = {**values, "truncation": None, "padding": None, "post_processor": None}
    changed["added_tokens"] = [
        {**token, "lstrip": False, "rstrip": False,
         "special": token["special"] or token["content"] in SPECIAL_TOKENS}
        for token in values.get("added_tokens", [])
    ]  # fmt: skip
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        changed[part] = _without_prefix(values.get(part), part)
    if values["model"].get("dropout"):
        changed["model"] = {**values["model"], "dropout": None}
    return changed


def _without_prefix(node: Node | None, part: str) -> Node | None:
    """Return a tokenization step without special treatment of the start of a text."""
    type_ = node and node["type"]
    if node is None or type_ == "Prepend" or (type_ == "Strip" and part == "decoder"):
        return None
    if type_ == "Metaspace":
        rest = {key: value for key, value in node.items() if key != "add_prefix_space"}
        return {**rest, "prepend_scheme": "never"}
    if type_ == "ByteLevel" and part == "pre_tokenizer":
        return {**node, "add_prefix_space": False}
    if type_ == "Sequence":
        lists = {key: value for key, value in node.items() if isinstance(value, list)}
        adapted = {key: [_without_prefix(s, part) for s in steps] for key, steps in lists.items()}
        return node | {key: [step for step in steps if step] for key, steps in adapted.items()}
    return node
