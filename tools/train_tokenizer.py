"""Tokenizer training: byte-level BPE on the text of the given files.

`python -m tools.train_tokenizer --data FILES --vocab-size N --sample-bytes 1GB --out DIR`

1. `read_texts` reads the same formats as training, at most `sample_bytes` in total, with an equal
   share for each file. Of larger files, it takes every n-th row. A file given twice counts twice.
2. `_hold_out` holds out one text in fifty, chosen by its sha1, for evaluation.
3. `train` builds the vocabulary: special tokens, 256 bytes, then merges.
4. `run` writes DIR/tokenizer.json and prints `bytes_per_token` for the held-out texts.

Text that looks like a special token is never parsed as one, neither here nor in model training.
"""

from __future__ import annotations

import trainlib.core.threads  # noqa: F401  # Before torch.

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tokenizer.bpe import SPECIAL_TOKENS
from tokenizer.chat_format import Tag, message_pieces
from trainlib.core.terminal import use_replacement_characters
from trainlib.data import formats
from trainlib.data.containers import Broken
from trainlib.data.findings import Counts

# Merges stay within these pieces: English contractions, letters with one preceding character (e.g.
# a space), single digits, punctuation with one newline after it, and runs of spaces. Every other
# newline is a separate piece, so
# - encode("assistant\n" + text) equals encode("assistant\n") + encode(text) for every text, and the
#   loss mask always matches the ids of the chat template;
# - no token has two newlines, so Qwen2's pre-tokenizer gives the same ids (llama.cpp: `qwen2`). It
#   keeps all newlines after punctuation or spaces in one piece.
# If newlines were never merged, texts would have 3% more tokens.
PRE_TOKENIZE_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+\n?"
    r"|\n"
    r"|[^\S\n]+(?!\S)"
    r"|[^\S\n]+"
)

HELD_OUT_BYTES = 20_000_000
"""Enough to measure bytes per token to three digits."""
MAX_PIECE = 1_000
"""Longer pieces are split in training only, whose time grows with the square of their length."""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    use_replacement_characters()
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_tokenizer",
        description="Train a byte-level BPE vocabulary.",
    )
    parser.add_argument(
        "--data", nargs="+", required=True, type=Path, help="as in training; duplicates count twice"
    )
    parser.add_argument("--vocab-size", type=int, default=6400)
    parser.add_argument("--sample-bytes", type=byte_count, default="1GB", help="e.g. 200MB")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--force", action="store_true", help="replace an existing tokenizer.json")
    options = parser.parse_args(argv)
    try:
        run(options)
    except (OSError, ValueError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """Train and write a vocabulary; raise ValueError for errors that the user can fix."""
    target = options.out / "tokenizer.json"
    if target.exists() and not options.force:
        raise ValueError(
            f"{target} exists, and models trained with it need it. Pass another --out, or --force"
            " to replace it."
        )
    smallest = len(SPECIAL_TOKENS) + 256
    if options.vocab_size < smallest:
        raise ValueError(
            f"--vocab-size {options.vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens"
            f" and 256 bytes need {smallest}. Pass a larger --vocab-size."
        )
    held_out: list[str] = []
    texts = _hold_out(read_texts(options.data, options.sample_bytes), held_out)
    bpe = train(texts, options.vocab_size)
    if bpe.get_vocab_size() < options.vocab_size:
        print(f"only {bpe.get_vocab_size()} entries: the text has no more pairs to merge")
    options.out.mkdir(parents=True, exist_ok=True)
    temporary = options.out / f".tokenizer.json.{os.getpid()}"
    try:
        temporary.write_text(bpe.to_str(pretty=True), encoding="utf-8", newline="\n")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {target}: {bpe.get_vocab_size()} entries")
    if held_out:
        print(f"held-out texts: {bytes_per_token(bpe, held_out):.3f} bytes per token")


def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer whose first ids are SPECIAL_TOKENS, in that order."""
    bpe = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PRE_TOKENIZE_PATTERN), behavior="isolated")
    parts = pre_tokenizers.Split(Regex(f"(?m).{{1,{MAX_PIECE}}}"), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pieces, parts, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=sys.stderr.isatty(),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    return bpe


def bytes_per_token(bpe: Tokenizer, texts: list[str]) -> float:
    """Return the number of UTF-8 bytes in the texts, divided by the number of tokens."""
    bpe.encode_special_tokens = True
    encodings = bpe.encode_batch(texts, add_special_tokens=False)
    return sum(len(t.encode("utf-8")) for t in texts) / sum(len(e.ids) for e in encodings)


def _hold_out(texts: Iterator[str], held_out: list[str]) -> Iterator[str]:
    """Yield the texts, except one in fifty, which is appended to `held_out`."""
    held_out_bytes = 0
    for text in texts:
        if hashlib.sha1(text.encode("utf-8")).digest()[0] % 50 or held_out_bytes > HELD_OUT_BYTES:
            yield text
        else:
            held_out.append(text)
            held_out_bytes += len(text.encode("utf-8"))


# ---- reading --------------------------------------------------------------------------------


def read_texts(files: list[Path], sample_bytes: int) -> Iterator[str]:
    """Yield the texts of all files, in total about sample_bytes of their size on disk.

    Raises ValueError if a file cannot be read or has a broken row.
    """
    found = [formats.detect(file) for file in files]
    sizes = [detection.source.size for detection in found]
    for (format_, source, *_), share in zip(found, shares(sizes, sample_bytes), strict=True):
        fraction = share / source.size
        items = (
            item for number, item in enumerate(source.items()) if number * fraction % 1 < fraction
        )
        options, kind = formats.ReadOptions(), format_.kind
        for line, records in formats.check_items(items, source.path, kind, options, Counts()):
            if isinstance(records, Broken):
                raise ValueError(f"{source.path}, line {line}: {records.reason}")
            for record in records:
                yield from _texts_of(record.value)


def shares(sizes: list[int], total: int) -> list[int]:
    """Return the bytes to read per file: equal shares; unused bytes go to larger files."""
    result = [0] * len(sizes)
    remaining = total
    for rank, i in enumerate(sorted(range(len(sizes)), key=lambda i: sizes[i])):
        result[i] = min(sizes[i], remaining // (len(sizes) - rank))
        remaining -= result[i]
    return result


def _texts_of(value: Any) -> Iterator[str]:
    """Yield a document, or the texts between the tags of each turn; those of a prompt once."""
    if isinstance(value, str):
        yield value
        return
    chosen, rejected = value if isinstance(value, tuple) else (value, [])
    for message in [*chosen, *(turn for turn in rejected if turn not in chosen)]:
        for piece in message_pieces(message):
            if piece and not isinstance(piece, Tag):
                yield piece


def byte_count(text: str) -> int:
    """Parse a number of bytes such as 300000, 500KB, 20MB or 1GB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|)", text.strip().upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a byte count such as 500MB or 1GB")
    return int(float(match[1]) * UNITS[match[2]])


if __name__ == "__main__":
    sys.exit(main())
