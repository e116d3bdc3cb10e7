"""Findings of the data doctor: which properties of rows a user should correct."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trainlib.data.findings import MAX_LINES, Counts


@dataclass
class Finding:
    """The number of rows with a property, and the line numbers of the first few."""

    count: int = 0
    lines: list[int] = field(default_factory=list)

    def add(self, line: int) -> None:
        """Count the row on this line."""
        self.count += 1
        if len(self.lines) < MAX_LINES:
            self.lines.append(line)


class Rule(NamedTuple):
    """When a property of the rows is a finding: its name, a share, the stages, and the fix."""

    name: str
    above: float
    """Share of the rows, which must be exceeded."""
    stages: tuple[str, ...]
    fix: str


ALL, CHATS = ("pretrain", "sft", "dpo"), ("sft", "dpo")
RULES = {
    "empty": Rule("empty rows or answers", 0.01, ALL, "Remove these rows, or complete them."),
    "no_supervised": Rule("rows without a supervised token in the context", 0.0, CHATS,
                          "Set a larger sequence_length, or remove these rows."),
    "exact_duplicates": Rule("exact duplicates", 0.01, ALL, "Remove the repeated rows."),
    "near_duplicates": Rule("near duplicates", 0.05, ALL, "Remove all but one of such rows."),
    "special_text": Rule("rows with the text of a special token", 0.01, CHATS,
                         "Such text is read as ordinary characters. Remove it."),
    "different_prompts": Rule("pairs with different prompts", 0.0, ("dpo",),
                              "Both answers must follow the same prompt."),
    "template_pairs": Rule("pairs that differ only in formatting", 0.01, ("dpo",),
                           "Remove these rows, or the model learns the formatting."),
}  # fmt: skip
"""The findings over the rows that are read, by the field of Report that counts them."""


def find(report: Any, counts: Counts) -> list[dict[str, Any]]:
    """Return what a user should correct in the file of a report, each with its share of rows."""
    found = [{**finding, "stages": [report.kind]} for finding in counts.findings()]
    for key, rule in RULES.items():
        finding: Finding = getattr(report, key)
        share = finding.count / max(1, report.rows)
        if share > rule.above and report.kind in rule.stages:
            found.append({
                "name": rule.name, "count": finding.count, "share": share, "lines": finding.lines,
                "stages": list(rule.stages), "fix": rule.fix,
            })  # fmt: skip
    return found
