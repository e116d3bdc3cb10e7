"""Counts of what training does not read: unread keys, rows that are not used, markers in texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from trainlib.core.errors import UserError

MIN_SHARE = 0.01  # Share of the rows from which a count is a finding.
MIN_TEXT_SHARE = 0.10  # Share of the rows with an unread key from which its texts are a finding.
MAX_KEYS = 50  # Number of unread keys that are counted by name.
MAX_LINES = 20  # Maximum number of lines that a finding lists; its count includes all rows.


@dataclass
class Counts:
    """Counts over the rows of a file that are not broken, with the first lines of each."""

    rows: int = 0
    not_used: dict[str, int] = field(default_factory=dict)  # Rows that are not used, by reason.
    unused_keys: dict[str, int] = field(default_factory=dict)  # Rows by key that nothing reads.
    unused_texts: dict[str, int] = field(default_factory=dict)  # Those in which it holds a text.
    split_rows: int = 0
    documents: int = 0  # Documents that the split rows became.
    special_text: int = 0  # Rows with the text of a special token that was not used as a marker.
    mapped: dict[str, int] = field(default_factory=dict)  # Rows by column that data.columns names.
    lines: dict[str, list[int]] = field(default_factory=dict)

    def add(self, line: int, unused: list[tuple[str, bool]], documents: int, special: bool) -> None:
        """Count a row that is used."""
        self.rows += 1
        for key, has_text in unused:
            if key not in self.unused_keys and len(self.unused_keys) >= MAX_KEYS:
                key = "(other keys)"
            self.unused_keys[key] = self.unused_keys.get(key, 0) + 1
            if has_text:
                self.unused_texts[key] = self.unused_texts.get(key, 0) + 1
                self._add_line(f"unused {key}", line)
        if documents > 1:
            self.split_rows += 1
            self.documents += documents
        if special:
            self.special_text += 1
            self._add_line("special_text", line)

    def add_not_used(self, line: int, reason: str) -> None:
        """Count an intact row that this stage does not use."""
        self.rows += 1
        self.not_used[reason] = self.not_used.get(reason, 0) + 1
        self._add_line(reason, line)

    def _add_line(self, name: str, line: int) -> None:
        lines = self.lines.setdefault(name, [])
        if len(lines) < MAX_LINES:
            lines.append(line)

    def merge(self, other: Counts) -> None:
        """Add the counts over later rows of the same file."""
        for name, value in asdict(other).items():
            ours = getattr(self, name)
            if isinstance(value, dict):
                for key, more in value.items():
                    both = ours[key] + more if key in ours else more
                    ours[key] = both[:MAX_LINES] if name == "lines" else both
            else:
                setattr(self, name, ours + value)

    def findings(self) -> list[dict[str, Any]]:
        """Return what a user should look at: name, count, share, lines and fix."""
        found = []

        def add(name: str, count: int, of: int, lines: str, fix: str) -> None:
            found.append({"name": name, "count": count, "share": count / max(1, of),
                          "lines": self.lines.get(lines, []), "fix": fix})  # fmt: skip

        for key, count in self.unused_texts.items():
            if count >= MIN_TEXT_SHARE * self.unused_keys[key]:
                add(f'"{key}" is not read', count, self.unused_keys[key], f"unused {key}",
                    "Map it with data.columns if it belongs to a prompt or an answer.")  # fmt: skip
        for reason, count in self.not_used.items():
            if count > MIN_SHARE * self.rows:
                add(f"not used: {reason}", count, self.rows, reason,
                    "Remove these rows, or correct them.")  # fmt: skip
        if self.special_text > MIN_SHARE * self.rows:
            add("text of a special token", self.special_text, self.rows, "special_text",
                "Such text is read as characters. Remove it, or fine-tune on chats.")  # fmt: skip
        return found

    def log_lines(self) -> list[str]:
        """Return lines for the log of a run: what was not read and what was split."""
        keys = ", ".join(f"{key} ({n:,} rows)" for key, n in self.unused_keys.items())
        reasons = ", ".join(f"{reason} ({n:,})" for reason, n in self.not_used.items())
        split = f"{self.split_rows:,} rows were split at markers into {self.documents:,} documents"
        not_used = f"{sum(self.not_used.values()):,} of {self.rows:,} rows are not used: {reasons}"
        lines = {f"keys that nothing reads: {keys}": keys, not_used: reasons}
        return [line for line, counted in {**lines, split: self.split_rows}.items() if counted]


def check_mapped_columns(counts: Iterable[dict[str, int]]) -> None:
    """Raise UserError if data.columns names a column that no file's Counts.mapped has."""
    total: Counter[str] = Counter()
    for mapped in counts:
        total.update(mapped)
    if missing := [column for column, rows in total.items() if not rows]:
        raise UserError(f'data.columns: no row has the column "{missing[0]}". Names are compared '
                        "exactly; correct it or remove the entry.")  # fmt: skip
