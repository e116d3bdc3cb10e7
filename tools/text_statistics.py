"""Scripts, languages and near-duplicates of texts, for the data doctor."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

SCRIPTS = (
    ("Han", (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x323AF), (0xF900, 0xFAFF)),
    ("Kana", (0x3040, 0x30FF),),
    ("Hangul", (0xAC00, 0xD7AF), (0x1100, 0x11FF)),
    ("Latin", (0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F)),
    ("Cyrillic", (0x400, 0x52F)),
    ("Greek", (0x370, 0x3FF)),
    ("Arabic", (0x600, 0x6FF)),
    ("Hebrew", (0x590, 0x5FF)),
    ("Devanagari", (0x900, 0x97F)),
    ("Thai", (0xE00, 0xE7F)),
    ("digits", (0x30, 0x39)),
    ("emoji", (0x1F300, 0x1FAFF), (0x2600, 0x27BF)),
)  # fmt: skip
NO_LETTERS = ("digits", "emoji", "other")
SHINGLE = 8
NUM_HASHES, BAND = 12, 4
MIN_EQUAL_HASHES = 10
"""Texts with this many equal hashes are near-duplicates: a Jaccard similarity of about 0.83."""
MAX_TEXTS = 2_000_000


def scripts(text: str) -> Counter[str]:
    """Count the characters in a text by script, ignoring white space."""
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    counts: Counter[str] = Counter()
    remaining = int((codes > 0x20).sum())
    for name, *ranges in SCRIPTS:
        n = sum(int(((codes >= low) & (codes <= high)).sum()) for low, high in ranges)
        if n:
            counts[name] = n
            remaining -= n
    counts["other"] = max(0, remaining)
    return counts


def language(text: str) -> str:
    """Guess the language of a text from its scripts."""
    counts = scripts(text)
    letters: dict[str, float] = {name: n for name, n in counts.items() if name not in NO_LETTERS}
    total = sum(letters.values())
    if not total:
        return "none"
    if letters.get("Kana", 0) > 0.1 * total:
        return "Japanese"
    # A Han character carries about as much information as four letters.
    letters["Latin"] = letters.get("Latin", 0) / 4
    best = max(letters, key=lambda name: letters[name])
    names = {"Han": "Chinese", "Hangul": "Korean", "Latin": "English or other Latin",
             "Cyrillic": "Russian or other Cyrillic"}  # fmt: skip
    return names.get(best, best)


def text_hash(text: str) -> int:
    """Return a 64-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def role_texts(value: Any) -> Iterator[tuple[str, str]]:
    """Yield (role, text) for every text in a row; the prompt of a pair is yielded once."""
    if isinstance(value, str):
        yield "text", value
        return
    messages = [*value[0], value[1][-1]] if isinstance(value, tuple) else value
    for message in messages:
        text = message["content"]
        if message.get("tool_calls"):
            text += json.dumps(message["tool_calls"], ensure_ascii=False)
        yield message["role"], message.get("reasoning_content", "") + text


def alnum(text: str) -> str:
    """Return only the letters and digits of a text."""
    return "".join(filter(str.isalnum, text))


def score(one: float, other: float) -> float:
    """Return 1 if `one` is greater than `other`, 0 if it is less, and 0.5 for a tie."""
    return 0.5 if one == other else float(one > other)


class MinHashes:
    """MinHashes of texts, over shingles of SHINGLE characters (Broder 1997)."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._factors = rng.integers(1, 2**63, NUM_HASHES, dtype=np.uint64) | np.uint64(1)
        self._powers = np.uint64(0x100000001B3) ** np.arange(SHINGLE, dtype=np.uint64)
        self._hashes = bytearray()
        self.count = 0

    def add(self, text: str) -> None:
        """Add the next text; texts after the first MAX_TEXTS are ignored."""
        if self.count == MAX_TEXTS:
            return
        packed = "".join(text.lower().split())[:20000]
        codes = np.frombuffer(packed.encode("utf-32-le", "replace"), np.uint32).astype(np.uint64)
        if len(codes) < SHINGLE:
            # Too short to have near-duplicates: use a unique value.
            values = np.full(NUM_HASHES, self.count, np.uint32)
        else:
            shingles = np.lib.stride_tricks.sliding_window_view(codes, SHINGLE) @ self._powers
            shingles ^= shingles >> np.uint64(31)
            mixed = shingles[None] * self._factors[:, None]
            values = (mixed >> np.uint64(32)).min(1).astype(np.uint32)
        self._hashes += values.tobytes()
        self.count += 1

    def duplicates(self) -> np.ndarray:
        """Return a mask of the texts that nearly duplicate an earlier one; bool (count,)."""
        hashes = np.frombuffer(self._hashes, np.uint32).reshape(-1, NUM_HASHES)
        found = np.zeros(self.count, bool)
        for start in range(0, NUM_HASHES, BAND):
            band = np.ascontiguousarray(hashes[:, start : start + BAND]).view(np.uint64)
            order = np.lexsort((np.arange(self.count), band[:, 0], band[:, 1]))
            same = (band[order[1:]] == band[order[:-1]]).all(1)
            one, other = order[:-1][same], order[1:][same]
            similar = (hashes[one] == hashes[other]).sum(1) >= MIN_EQUAL_HASHES
            found[other[similar]] = True
        return found
