"""Tokenizer: text to ids and back, by BPE from the `tokenizers` library.

`Tokenizer` never parses special tokens in text, so typing one cannot forge a turn. The default
vocabulary is tokenizer.json, trained by tools/train_tokenizer.py; adopt.py loads other tokenizers.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Bpe
from tokenizers import decoders

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
REQUIRED_TOKENS = (END_OF_TEXT, IM_START, IM_END)  # Special tokens that every tokenizer must have.
SPECIAL_TOKENS: tuple[str, ...] = (
    *REQUIRED_TOKENS, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<think>", "</think>", *(f"<|reserved_{i}|>" for i in range(27)),
)  # fmt: skip
"""Ids 0, 1, 2, ... in this order. Reserved tokens let a model learn new tags later."""

LONG_TEXT = 1 << 18
"""Characters from which a text is encoded in parts: the library takes 150 bytes for each byte."""
CONTEXT = 512
"""Characters on each side of a cut that must be encoded in the same way with and without it."""


@dataclass(frozen=True)
class Sequence:
    """Token ids, and a loss mask that is 1 for each supervised id."""

    ids: array[int]
    mask: bytes | bytearray


class Tokenizer:
    """A tokenizer: text to ids, ids to text or bytes.

    `text` replaces tokenizer.json. Raises ValueError if it is missing, incomplete or not lossless.
    """

    def __init__(self, folder: str | Path, text: str | None = None) -> None:
        path = Path(folder) / "tokenizer.json"
        self.folder = Path(folder)
        self.json = read_json(path) if text is None else text
        self._bpe = load_bpe(self.json, path)
        # Special tokens in a text are encoded as text. tokenizer.json does not hold this setting.
        self._bpe.encode_special_tokens = True
        self._byte_level = isinstance(self._bpe.decoder, decoders.ByteLevel)
        self._added_tokens = self._bpe.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in self._added_tokens.items() if token.special)
        self.end_of_text_id, self.im_start_id, self.im_end_id = (
            self._required_id(token, path) for token in REQUIRED_TOKENS
        )
        self.stop_ids = (self.im_end_id, self.end_of_text_id)  # The ids that end an answer.
        self._check_round_trip(path)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path, str]]:
        """Pickle the constructor's arguments; a pickled `_bpe` would lose encode_special_tokens."""
        return Tokenizer, (self.folder, self.json)

    def _required_id(self, token: str, path: Path) -> int:
        id_ = self._bpe.token_to_id(token)
        if id_ is None:
            raise ValueError(f"{path} lacks the special token {token}. Run train.py "
                             f"tokenizer={path.parent}, which adds it.")  # fmt: skip
        return id_

    def _check_round_trip(self, path: Path) -> None:
        for text in (ROUND_TRIP_TEXT, f" {ROUND_TRIP_TEXT}"):
            try:
                decoded = self.decode(self.encode(text))
            except Exception as error:  # `tokenizers` raises a bare Exception.
                decoded = f"an error: {error}"
            if decoded != text:
                raise ValueError(f"{path} is not lossless: {text!r} became {decoded!r}. Use a "
                                 "byte-level BPE, or a BPE with byte fallback, that neither "
                                 "lower-cases text nor adds spaces.")  # fmt: skip

    @cached_property
    def vocab_size(self) -> int:
        """Return the highest id + 1, including special tokens."""
        return 1 + max(self._bpe.get_vocab(with_added_tokens=True).values())

    @property
    def typecode(self) -> str:
        """Return the type of an array of ids: 16 bits if they fit, else 32."""
        return "H" if self.vocab_size <= 1 << 16 else "I"

    @cached_property
    def fingerprint(self) -> str:
        """Return a 16-digit hex hash of tokenizer.json."""
        return hashlib.sha256(self.json.encode()).hexdigest()[:16]

    @cached_property
    def id_to_bytes(self) -> tuple[bytes, ...]:
        """Return the bytes of each id; empty for special tokens and unused ids."""
        return tuple(self._bytes_of(id_) for id_ in range(self.vocab_size))

    def _bytes_of(self, id_: int) -> bytes:
        token = self._bpe.id_to_token(id_)
        if token is None or id_ in self.special_ids:
            return b""
        if id_ in self._added_tokens:
            return token.encode()
        if self._byte_level:
            return b"".join(BYTE_OF_CHARACTER.get(c, c.encode()) for c in token)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(byte[1])
        return token.replace("\u2581", " ").encode()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens in it are encoded as text."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> array[int]:
        """Return the ids as an array, which takes a tenth of a list's memory."""
        ids, begin = array(self.typecode), 0
        while begin < len(text):
            end = begin + LONG_TEXT
            if end < len(text):
                end = next(
                    (end - i for i in range(CONTEXT) if self._is_cut(text, end - i, i)), None
                )
            ids.fromlist(self._bpe.encode(text[begin:end], add_special_tokens=False).ids)
            begin = len(text) if end is None else end
        return ids

    def _is_cut(self, text: str, end: int, more: int) -> bool:
        """Return whether the ids around a position are those of its two sides, encoded alone.

        `more` varies the size of the left side, because tokens repeat in a text that repeats.
        """
        left, right = text[end - CONTEXT - more : end], text[end : end + CONTEXT]
        both, *sides = (self._bpe.encode(part, add_special_tokens=False).ids
                        for part in (left + right, left, right))  # fmt: skip
        return both == sides[0] + sides[1]

    def tag_id(self, tag: str) -> int | None:
        """Return the id of a special token; None if the vocabulary lacks it."""
        id_ = self._bpe.token_to_id(tag)
        return id_ if id_ in self.special_ids else None

    def decode_bytes(self, ids: SequenceABC[int]) -> bytes:
        """Return the bytes of ids; special tokens and unused ids have none."""
        return b"".join(self._bytes_of(id_) for id_ in ids)

    def decode(self, ids: SequenceABC[int]) -> str:
        """Return the text of ids without special tokens; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def show(self, ids: SequenceABC[int]) -> str:
        """Return the text of ids, including special tokens."""
        return self._bpe.decode(list(ids), skip_special_tokens=False)

    def files(self, context_length: int) -> dict[str, str]:
        """Return the tokenizer files for a Hugging Face model folder, as name to content."""
        config = {
            # For any other class, transformers 5 replaces the pre-tokenizer.
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length,
            "pad_token": END_OF_TEXT, "eos_token": IM_END, "bos_token": None, "unk_token": None,
            "clean_up_tokenization_spaces": False, "chat_template": chat_template(),
        }  # fmt: skip
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        return {"tokenizer.json": self.json, "tokenizer_config.json": text}


def default_folder() -> Path:
    """Return the folder of the project's own tokenizer."""
    return Path(__file__).absolute().parent


def chat_template() -> str:
    """Return chat_template.jinja without its comment, indentation and line breaks."""
    text = (default_folder() / "chat_template.jinja").read_text(encoding="utf-8")
    return "".join(line.strip() for line in text.partition("#}")[2].splitlines())


def read_json(path: Path) -> str:
    """Return the content of a tokenizer.json; raise ValueError if it is missing or not JSON."""
    if not path.is_file():  # Reading a pipe would never end.
        raise ValueError(f"{path} does not exist. Pass a folder with tokenizer.json.")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Replace the file.") from error
    if not isinstance(values, dict) or "model" not in values:
        raise ValueError(f'{path} has no "model", so it is not a `tokenizers` file')
    return text


def load_bpe(text: str, path: Path) -> Bpe:
    """Load a tokenizer.json; raise ValueError if the `tokenizers` library cannot."""
    try:
        return Bpe.from_str(text)
    except Exception as error:  # `tokenizers` raises a bare Exception.
        raise ValueError(f"{path}: the `tokenizers` library cannot load it: {error}") from error


PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_OF_CHARACTER = {chr(byte): bytes([byte]) for byte in PRINTABLE}
BYTE_OF_CHARACTER |= {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(OTHERS)}
"""The byte that each character of a byte-level BPE represents; printable Latin-1 is itself."""
ROUND_TRIP_TEXT = "A b  c\n\t 1.5% 中文 \u00e9 \u0416 😀\r\n x"  # Lossless tokenizers keep it.
