"""Tokenizer training: byte-level BPE on the text of the given files.

`python -m tools.train_tokenizer --data FILES --vocab-size N --sample-bytes 1GB --out DIR`

1. `read_texts` streams at most `sample_bytes` in total, with an equal share for each file. Larger
   files are sampled in sections spread over their length. A file given twice counts twice.
2. `_hold_out` holds out one text in fifty, chosen by its sha1, for evaluation.
3. `train` builds the vocabulary: special tokens, 256 bytes, then merges.
4. `run` writes DIR/tokenizer.json and prints `bytes_per_token` for the held-out texts.

Text that looks like a special token is never parsed as one, neither here nor in model training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tokenizer.bpe import SPECIAL_TOKENS
from trainlib.core.terminal import use_replacement_characters
from trainlib.data.containers import utf8_error

# Merges stay within these pieces: English contractions, letters with one preceding character (e.g.
# a space), single digits, punctuation with the newlines after it, and runs of spaces. A newline
# after anything but punctuation is a separate piece, so encode("assistant\n" + text) equals
# encode("assistant\n") + encode(text) for every text, and the loss mask always matches the ids of
# the chat template. If newlines were never merged, texts would have 3% more tokens.
PRE_TOKENIZE_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+\n*"
    r"|\n"
    r"|[^\S\n]+(?!\S)"
    r"|[^\S\n]+"
)

SECTION_BYTES = 1 << 20
HELD_OUT_BYTES = 20_000_000
"""Enough to measure bytes per token to three digits."""
# A row has one of the first three keys, or some of the others.
TEXT_KEYS = (
    *("text", "conversations", "messages"),
    *("prompt", "chosen", "rejected", "instruction", "input", "output"),
)
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    use_replacement_characters()
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_tokenizer",
        description="Train a byte-level BPE vocabulary.",
    )
    parser.add_argument(
        "--data", nargs="+", required=True, type=Path, help=".jsonl/.txt; duplicates count twice"
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
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZE_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=sys.stderr.isatty(),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
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
    """Yield the texts of all files, reading at most sample_bytes in total.

    Raises ValueError if a file is missing or has a broken line.
    """
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is not a file. Pass .jsonl or .txt files to --data.")
    sizes = [file.stat().st_size for file in files]
    for file, share in zip(files, shares(sizes, sample_bytes), strict=True):
        for line, offset in _lines(file, share):
            if file.suffix == ".txt":
                yield line
            else:
                yield from _texts_of(line, file, offset)


def shares(sizes: list[int], total: int) -> list[int]:
    """Return the bytes to read per file: equal shares; unused bytes go to larger files."""
    result = [0] * len(sizes)
    remaining = total
    for rank, i in enumerate(sorted(range(len(sizes)), key=lambda i: sizes[i])):
        result[i] = min(sizes[i], remaining // (len(sizes) - rank))
        remaining -= result[i]
    return result


def _lines(file: Path, share: int) -> Iterator[tuple[str, int]]:
    """Yield lines (JSONL) or groups of lines (.txt), `share` bytes in total, and their offsets."""
    size = file.stat().st_size
    num_sections = 1 if share >= size else max(1, min(64, share // SECTION_BYTES))
    with file.open("rb") as stream:
        for number in range(num_sections):
            stream.seek(size * number // num_sections)
            if number:
                stream.readline()  # Skip the rest of a partial line.
            remaining = share // num_sections
            while remaining > 0 and (raw := _next_text(stream, file)):
                offset = stream.tell() - len(raw)
                remaining -= len(raw)
                text = _decode(raw, file, offset)
                if remaining >= 0 and text.strip():
                    yield text.rstrip("\r\n"), offset


def _decode(raw: bytes, file: Path, offset: int) -> str:
    """Decode lines that start at this byte offset; raise ValueError if they are not UTF-8."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        start = raw.rfind(b"\n", 0, error.start) + 1
        reason = utf8_error(raw[start:].split(b"\n", 1)[0], error.start - start)
        raise ValueError(f"{file}, line at byte {offset + start}: {reason}") from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def _next_text(stream: Any, file: Path) -> bytes:
    """Return the next line or, in a .txt file, where newlines are text, about 4 KB of lines."""
    if file.suffix != ".txt":
        return stream.readline()
    return b"".join(stream.readlines(4_000))


def _texts_of(line: str, file: Path, offset: int) -> Iterator[str]:
    """Yield the texts in a JSONL row; each turn of a conversation is a separate text."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{file}, line at byte {offset}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{file}, line at byte {offset}: not a JSON object")
    values = [row[key] for key in TEXT_KEYS if isinstance(row.get(key), str | list)]
    if not values:
        raise ValueError(
            f"{file}, line at byte {offset}: {sorted(row)[:8]} has none of {', '.join(TEXT_KEYS)}"
        )
    for value in values:
        for turn in value if isinstance(value, list) else [value]:
            content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else turn
            if isinstance(content, str) and content:
                yield content


def byte_count(text: str) -> int:
    """Parse a number of bytes such as 300000, 500KB, 20MB or 1GB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|)", text.strip().upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a byte count such as 500MB or 1GB")
    return int(float(match[1]) * UNITS[match[2]])


if __name__ == "__main__":
    sys.exit(main())
