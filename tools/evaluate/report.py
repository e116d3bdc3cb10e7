"""The table and the JSON object of results, with the differences between two models.

Differences are paired: each item's difference is taken first, so that what is hard for both models
does not widen the interval.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tools.evaluate.measure import HOT, Items, Results
from trainlib.core.errors import UserError
from trainlib.core.files import write_atomically
from trainlib.evaluation.skills import Z95, counted, format_counts

SECTIONS = {
    "bits_per_byte": "Bits per byte of held-out text (less is better)",
    "skills": "Skills: share of questions answered exactly",
    "preferences": "Preferences: share of pairs whose chosen answer is more likely",
    "rewards": "Rewards: share of pairs preferred more than by the model before DPO",
    "answers": "Answers to held-out prompts, at most 128 tokens: share that",
}


def difference(a: Items, b: Items) -> tuple[float, float, float] | None:
    """Return b - a with its 95 % interval, over the items that are equal in both; None below two.

    The standard error is that of a ratio of sums, by linearization (Cochran, Sampling Techniques,
    section 6.3). Where all items agree, it is 0.
    """
    if len(a.sizes) != len(b.sizes):
        return None  # Other tokenizers, so other rows were dropped.
    same = (a.sizes == b.sizes) & (a.sizes > 0)
    n, sizes = int(same.sum()), a.sizes[same]
    if n < 2:
        return None
    changes = (b.amounts - a.amounts)[same]
    value = float(changes.sum() / sizes.sum())
    rest = changes - value * sizes
    half = Z95 * math.sqrt(n / (n - 1) * float(np.square(rest).sum())) / float(sizes.sum())
    return value, value - half, value + half


def as_json(all_results: list[Results]) -> dict[str, Any]:
    """Return the results as a JSON object, described in docs/evaluation.md."""
    result: dict[str, Any] = {"models": [_model(results) for results in all_results]}
    if len(all_results) == 2:
        result["differences"] = {
            section: {
                name: {"difference": found[0], "low": found[1], "high": found[2]}
                for name, found in _differences(all_results[0], all_results[1], section).items()
            }
            for section in SECTIONS
        }
    return result


def _differences(one: Results, two: Results, section: str) -> dict[str, tuple[float, float, float]]:
    """Return the differences of a section's rows that both models have."""
    a, b = getattr(one, section), getattr(two, section)
    both = {name: difference(a[name], b[name]) for name in a if name in b}
    return {name: found for name, found in both.items() if found}


def _counts(items: Items) -> dict[str, float]:
    correct, total = float(items.amounts.sum()), len(items.sizes)
    # Ties count one half.
    return counted(int(correct) if correct.is_integer() else correct, total)


def _model(r: Results) -> dict[str, Any]:
    def share(name: str) -> float | None:
        return r.answers[name].value if name in r.answers else None

    preferences: dict[str, dict[str, Any]] = {
        kind: {**_counts(items), "rule": r.rules[kind][0], "rule_accuracy": r.rules[kind][1]}
        for kind, items in r.preferences.items()
    }
    for kind, items in r.rewards.items():
        preferences[kind]["reward_correct"] = _counts(items)["correct"]
    return {
        "path": r.path,
        "parameters": r.parameters,
        "bits_per_byte": {name: items.value for name, items in r.bits_per_byte.items()},
        "perplexity": r.perplexity,
        "baselines": r.baselines,
        "skills": {name: _counts(items) for name, items in r.skills.items()},
        "preferences": preferences,
        "repetition": share("repeat, greedy"),
        "stopped": share("end, greedy"),
        "sampled": {"temperature": HOT, "repetition": share(f"repeat, at {HOT}"),
                    "stopped": share(f"end, at {HOT}")},
        "notes": r.notes,
    }  # fmt: skip


def table(all_results: list[Results]) -> str:
    """Return the results as text; of two models with their differences."""
    lines = [f"{'ABCDEFGH'[i]}  {r.path}: {r.parameters / 1e6:.1f}M parameters"
             for i, r in enumerate(all_results)]  # fmt: skip
    lines += [f"note: {note}" for note in dict.fromkeys(n for r in all_results for n in r.notes)]
    for section, title in SECTIONS.items():
        tables = [getattr(r, section) for r in all_results]
        names = dict.fromkeys(name for rows in tables for name in rows)
        if names:
            columns = _one if len(all_results) == 1 else _two
            lines += ["", title, *columns(all_results, section, list(names))]
    return "\n".join(lines)


def card_parts(folder: Path) -> tuple[str, str]:
    """Return the model card before and after its table; raise UserError if there is no place."""
    path = folder / "README.md"
    begin, end = "<!-- begin evaluation -->\n", "<!-- end evaluation -->"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise UserError(f"{path} has no lines {begin.strip()} and {end}. Add them to it.")
    return before + begin, end + after


def write_to_card(results: Results) -> None:
    """Write the table into the model card in the model's folder, instead of an earlier one.

    The card is made to be published, so it names no path.
    """
    folder = Path(results.path)
    before, after = card_parts(folder)
    notes = [re.sub(r"[^\s,]*/", "", note) for note in results.notes]
    lines = table([replace(results, path=folder.resolve().name, notes=notes)])
    write_atomically(folder / "README.md", f"{before}```text\n{lines}\n```\n{after}")


def _one(all_results: list[Results], section: str, names: list[str]) -> list[str]:
    """Return the lines of a section for one model."""
    r = all_results[0]
    rows: dict[str, Items] = getattr(r, section)
    if section == "skills":
        return [f"  {line}" for line in format_counts({n: _counts(i) for n, i in rows.items()})]
    if section == "bits_per_byte":
        lines = [f"  {'source':<22}{'bits/byte':>10}{'perplexity':>12}"
                 f"{'bigram':>9}{'unigram':>9}{'uniform':>9}"]  # fmt: skip
        for name in names:
            base = r.baselines.get(name, {})
            cells = (f"{base[key]:9.3f}" if base else f"{'-':>9}"
                     for key in ("bigram", "unigram", "uniform"))  # fmt: skip
            head = f"  {name:<22}{rows[name].value:10.3f}{r.perplexity[name]:12.1f}"
            lines.append(head + "".join(cells))
        return lines
    lines = []
    for name in names:
        c = _counts(rows[name])
        text = f"  {name:<22}{rows[name].value:10.3f}  ({c['low']:.2f} to {c['high']:.2f}), "
        text += f"n {c['total']}"
        if section == "preferences":
            rule, accuracy = r.rules[name]
            text += f"; best trivial rule: {rule} {accuracy:.3f}"
        lines.append(text)
    return lines


def _two(all_results: list[Results], section: str, names: list[str]) -> list[str]:
    """Return the lines of a section for two models, with B - A and its 95 % interval."""
    found = _differences(all_results[0], all_results[1], section)
    lines = [f"  {'':<22}{'A':>10}{'B':>10}{'B - A':>10}  95 % interval, paired by item"]
    for name in names:
        values = []
        for r in all_results:
            items = getattr(r, section).get(name)
            values.append(f"{items.value:10.3f}" if items else f"{'-':>10}")
        text = f"{'-':>10}"
        if name in found:
            value, low, high = found[name]
            text = f"{value:+10.3f}  {low:+.3f} to {high:+.3f}"
            text += "" if low <= 0 <= high else "  *"
        lines.append(f"  {name:<22}{''.join(values)}{text}")
    return lines
