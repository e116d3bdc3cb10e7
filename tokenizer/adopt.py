"""A vocabulary from elsewhere, made fit for training from nothing.

Accepted is every tokenizer.json that gives each text back from its ids: byte-level BPE (the kind of
GPT-2, Llama 3, Qwen) and BPE or Unigram with byte fallback (SentencePiece, the kind of Llama 2).
What is changed, so that ids of pieces of a text join to ids of the text; the changed file is the
one that checkpoints carry:

    special tokens     those of NEEDED that it lacks follow its last id; its own others are not used
    beginning of text  no space is put in front of a text, and no token by a post-processor
    length             no truncation, no padding, no dropout of merges
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from tokenizer.bpe import NEEDED, Tokenizer, load_bpe, read_json

Node = dict[str, Any]


def adopt(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder with those changes; one that needs none keeps its very bytes.

    Raises ValueError where the file cannot be read, or loses parts of a text.
    """
    path = Path(folder) / "tokenizer.json"
    text = read_json(path)
    values: Node = json.loads(text)
    special = {token["content"] for token in values.get("added_tokens", []) if token["special"]}
    changed = _changed(values)
    if changed == values and special.issuperset(NEEDED):
        return Tokenizer(folder)
    bpe = load_bpe(json.dumps(changed, ensure_ascii=False), path)
    bpe.add_special_tokens([AddedToken(token, special=True) for token in NEEDED])
    return Tokenizer(folder, bpe.to_str())


def _changed(values: Node) -> Node:
    changed = {**values, "truncation": None, "padding": None, "post_processor": None}
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        changed[part] = _without_prefix(values.get(part), part)
    if values["model"].get("dropout"):
        changed["model"] = {**values["model"], "dropout": None}
    return changed


def _without_prefix(node: Node | None, part: str) -> Node | None:
    """A step of the tokenizer without what treats the beginning of a text apart."""
    kind = node and node["type"]
    if node is None or kind == "Prepend" or (kind == "Strip" and part == "decoder"):
        return None
    if kind == "Metaspace":
        rest = {key: value for key, value in node.items() if key != "add_prefix_space"}
        return {**rest, "prepend_scheme": "never"}
    if kind == "ByteLevel" and part == "pre_tokenizer":
        return {**node, "add_prefix_space": False}
    if kind == "Sequence":
        return {key: _members(value, part) for key, value in node.items()}
    return node


def _members(value: Any, part: str) -> Any:
    if not isinstance(value, list):
        return value
    members = [_without_prefix(member, part) for member in value]
    return [member for member in members if member is not None]
