"""Train the vocabulary: byte-level BPE over the text of the given files.

`python -m tools.train_tokenizer --data FILES --vocab-size N --sample-bytes 1GB --out DIR`

1. `read_texts` streams the files, at most `sample_bytes` in all and evenly over the files: of one
   that is too large for its share, stretches from its beginning to its end. A file named twice
   counts twice.
2. One text in fifty is held out, by its sha1.
3. `train` makes the vocabulary: special tokens, 256 bytes, then merges.
4. DIR/tokenizer.json is written, and bytes per token of the held-out texts are printed.

Special tokens are never parsed out of the text, neither here nor in training a model.
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
from trainlib.data.containers import not_utf8

# Pieces that merges never cross: English contractions, a run of letters with the one character
# before it (a space, a comma), single digits, punctuation with the newlines after it, blanks.
# A newline after anything but punctuation is a piece of its own: so encode("assistant\n" + text)
# == encode("assistant\n") + encode(text) for every text, and the loss mask can never disagree
# with the ids of the chat template. Newlines that never merge at all cost 3 % of length.
PRE_TOKENIZE_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+\n*"
    r"|\n"
    r"|[^\S\n]+(?!\S)"
    r"|[^\S\n]+"
)

STRETCH_BYTES = 1 << 20
HELD_OUT_BYTES = 20_000_000  # enough for three digits of bytes per token
# A row has one of the first three, or some of the others.
TEXT_KEYS = (
    *("text", "conversations", "messages"),
    *("prompt", "chosen", "rejected", "instruction", "input", "output"),
)
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_tokenizer",
        description="Train a byte-level BPE vocabulary.",
    )
    parser.add_argument(
        "--data", nargs="+", required=True, type=Path, help=".jsonl or .txt; twice counts twice"
    )
    parser.add_argument("--vocab-size", type=int, default=6400)
    parser.add_argument("--sample-bytes", type=byte_count, default="1GB", help="e.g. 200MB")
    parser.add_argument("--out", type=Path, required=True, help="folder of tokenizer.json")
    parser.add_argument("--force", action="store_true", help="replace an existing tokenizer.json")
    options = parser.parse_args(argv)
    try:
        run(options)
    except (OSError, ValueError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """Train, write and report.

    Raises: ValueError for what the user can cure.
    """
    target = options.out / "tokenizer.json"
    if target.exists() and not options.force:
        raise ValueError(
            f"{target} exists, and models trained with it need it: choose another --out, or"
            " --force to replace it"
        )
    smallest = len(SPECIAL_TOKENS) + 256
    if options.vocab_size < smallest:
        raise ValueError(
            f"--vocab-size {options.vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens"
            f" and 256 bytes need {smallest}"
        )
    held_out: list[str] = []
    texts = _keep_apart(read_texts(options.data, options.sample_bytes), held_out)
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
        print(f"held-out slice: {bytes_per_token(bpe, held_out):.3f} bytes per token")


def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer whose first ids are SPECIAL_TOKENS, in their order."""
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
    """UTF-8 bytes of the texts over the tokens they become."""
    bpe.encode_special_tokens = True
    encodings = bpe.encode_batch(texts, add_special_tokens=False)
    return sum(len(t.encode("utf-8")) for t in texts) / sum(len(e.ids) for e in encodings)


def _keep_apart(texts: Iterator[str], held_out: list[str]) -> Iterator[str]:
    """The texts but one in fifty, which go to `held_out`."""
    kept_bytes = 0
    for text in texts:
        if hashlib.sha1(text.encode("utf-8")).digest()[0] % 50 or kept_bytes > HELD_OUT_BYTES:
            yield text
        else:
            held_out.append(text)
            kept_bytes += len(text.encode("utf-8"))


# ---- reading --------------------------------------------------------------------------------


def read_texts(files: list[Path], sample_bytes: int) -> Iterator[str]:
    """The texts of all files, at most sample_bytes of file in all.

    Raises: ValueError for a file that is missing, of another kind, or has a broken line.
    """
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is not a file")
    sizes = [file.stat().st_size for file in files]
    for file, share in zip(files, shares(sizes, sample_bytes), strict=True):
        for line, offset in _lines(file, share):
            if file.suffix == ".txt":
                yield line
            else:
                yield from _texts_of(line, file, offset)


def shares(sizes: list[int], total: int) -> list[int]:
    """Bytes to read of each file: equal, and what small files leave goes to the large ones."""
    given = [0] * len(sizes)
    left = total
    for rank, i in enumerate(sorted(range(len(sizes)), key=lambda i: sizes[i])):
        given[i] = min(sizes[i], left // (len(sizes) - rank))
        left -= given[i]
    return given


def _lines(file: Path, share: int) -> Iterator[tuple[str, int]]:
    """Lines (JSONL) or groups of lines (.txt) with their byte offset, `share` bytes in all."""
    size = file.stat().st_size
    stretches = 1 if share >= size else max(1, min(64, share // STRETCH_BYTES))
    with file.open("rb") as stream:
        for number in range(stretches):
            stream.seek(size * number // stretches)
            if number:
                stream.readline()  # the rest of a line that began before
            left = share // stretches
            while left > 0 and (raw := _next_text(stream, file)):
                offset = stream.tell() - len(raw)
                left -= len(raw)
                text = _decode(raw, file, offset)
                if left >= 0 and text.strip():
                    yield text.rstrip("\r\n"), offset


def _decode(raw: bytes, file: Path, offset: int) -> str:
    """The text of whole lines that begin at a byte of a file; raises ValueError where none is."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        start = raw.rfind(b"\n", 0, error.start) + 1
        reason = not_utf8(raw[start:].split(b"\n", 1)[0], error.start - start)
        raise ValueError(f"{file}, line at byte {offset + start}: {reason}") from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def _next_text(stream: Any, file: Path) -> bytes:
    """The next line, or of a .txt file some lines of about 4 KB, as newlines are text there."""
    if file.suffix != ".txt":
        return stream.readline()
    return b"".join(stream.readlines(4_000))


def _texts_of(line: str, file: Path, offset: int) -> Iterator[str]:
    """The texts in one row of JSONL, each turn of a conversation on its own."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{file}, at byte {offset}: not a line of JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{file}, at byte {offset}: not a JSON object")
    found = [row[key] for key in TEXT_KEYS if isinstance(row.get(key), str | list)]
    if not found:
        raise ValueError(
            f"{file}, at byte {offset}: none of {', '.join(TEXT_KEYS)} in {sorted(row)[:8]}"
        )
    for value in found:
        for turn in value if isinstance(value, list) else [value]:
            content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else turn
            if isinstance(content, str) and content:
                yield content


def byte_count(text: str) -> int:
    """A number of bytes written like 300000, 500KB, 20MB or 1GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|)", text.strip().upper())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes like 500MB or 1GB")
    return int(float(found[1]) * UNITS[found[2]])


if __name__ == "__main__":
    sys.exit(main())
