"""Data doctor reports, as terminal text or an HTML page.

Supervised text is blue and underlined, other text orange, which colour-blind readers can
distinguish.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from typing import Any

from tools.data_findings import RULES

Report = dict[str, Any]
MAX_TRUNCATED = 0.10
"""Share of all tokens that may be truncated before the report suggests a fix."""
MAX_BROKEN = 50
"""Maximum number of broken rows shown in the terminal; --json lists all."""


FINDINGS = {**{key: rule.name for key, rule in RULES.items()},
            "equal_pairs": "pairs with identical answers"}  # fmt: skip
"""The properties of rows that a report counts, by its field."""


def facts(report: Report) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for everything except broken rows, the histogram and examples."""
    name = f"{report['format']} ({report['kind']})" if report["format"] else "unknown"
    yield "format", name
    if not report["format"] and report["rows"]:
        yield "known formats", "python -m tools.inspect_data --help"
    if report["why"]:
        yield "detected from", report["why"]
    yield "rows", f"{report['rows']:,}  (broken: {len(report['broken']):,})"
    if not report["rows_looked_at"]:
        return
    sample = ""
    if report["sampled"]:
        sample = f"  (estimated; rows in the sample: {report['rows_looked_at']:,})"
    yield "tokens", f"{report['tokens']:,}{sample}"
    share = report["supervised_tokens"] / max(1, report["tokens"])
    yield "supervised tokens", f"{report['supervised_tokens']:,}  ({share:.1%})"
    yield "bytes per token", f"{report['bytes_per_token']:.3f}"
    if report["retrained_bytes_per_token"]:
        retrained = f"{report['retrained_bytes_per_token']:.3f}"
        if report["retrain_command"]:
            retrained += f"  run: {report['retrain_command']}"
        yield "bytes per token with a vocabulary trained on this file", retrained
    length = report["length"]
    yield "tokens per row", "  ".join(f"{k} {v:,.0f}" for k, v in length.items())
    yield (
        f"rows longer than the context of {report['sequence_length']:,}",
        f"{report['truncated_rows']:.1%}  ({report['truncated_tokens']:.1%} of all tokens)",
    )
    yield (
        "padding without packing",
        f"{report['padding_unpacked']:.1%}  with packing {report['padding_packed']:.1%}  "
        f"(speedup {report['packing_gain']:.2f}x)",
    )
    yield from _problems(report)
    shown = ((k, v) for k, v in report["scripts"].items() if v >= 0.001)
    yield "scripts", "  ".join(f"{k} {v:.1%}" for k, v in shown)
    yield "languages (rows)", "  ".join(f"{k} {v:,}" for k, v in report["languages"].items())
    if report["trivial_rules"]:
        rules = "  ".join(f"{k} {v:.3f}" for k, v in report["trivial_rules"].items())
        yield "accuracy of trivial baselines", rules
    yield "token cache on disk", f"{report['cache_bytes'] / 1e6:,.1f} MB"
    steps = f"{report['steps_per_epoch']:,} steps of {report['tokens_per_step']:,}"
    steps += " tokens"
    if report["hours_per_epoch"]:
        speed = f"{report['tokens_per_second']:,.0f} tokens per second"
        if report["speed_of"]:
            speed += f" (measured in {report['speed_of']})"
        steps += f"; {report['hours_per_epoch']:,.2f} hours at {speed}"
    else:
        steps += "; hours unknown (pass --tokens-per-second N)"
    yield "one epoch", steps


def _problems(report: Report) -> Iterator[tuple[str, str]]:
    """Yield what to fix, the keys that are not read, and the number of rows with a property."""
    for text in truncation_fixes(report):
        yield "to fix (lost to truncation)", text
    for finding in report["findings"]:
        share = f"{finding['count']:,} ({finding['share']:.1%})"
        text = f"{finding['name']}: {share}, {_lines_of(finding)}. {finding['fix']}"
        yield "to fix", text
    if report["split_rows"]:
        rows = f"{report['split_rows']:,} into {report['documents']:,} documents"
        yield "rows split at markers", rows
    if report["unused_keys"]:
        unread = ", ".join(f"{key} ({n:,} rows)" for key, n in report["unused_keys"].items())
        yield "keys that are not read", unread
    for key, phrase in FINDINGS.items():
        if report[key]["count"]:
            yield phrase, f"{report[key]['count']:,}  ({_lines_of(report[key])})"


def _lines_of(finding: dict[str, Any]) -> str:
    more = " ..." if finding["count"] > len(finding["lines"]) else ""
    return f"lines {', '.join(map(str, finding['lines']))}{more}"


def truncation_fixes(report: Report) -> Iterator[str]:
    """Yield descriptions of what training would lose to truncation, and how to avoid it."""
    if report["kind"] in (None, "pretrain"):
        return  # A document longer than a row continues in the next one.
    sequences = 2 if report["kind"] == "dpo" else 1
    lost = []
    if report["truncated_tokens"] > MAX_TRUNCATED:
        lost.append(f"{report['truncated_tokens']:.1%} of all tokens")
    if report["no_supervised"]["count"]:
        count = f"{report['no_supervised']['count']:,}"
        lost.append(f"{count} rows without a supervised token in the context")
    if lost:
        most, p95 = (math.ceil(report["length"][k] / sequences) for k in ("most", "95%"))
        fix = f"Set sequence_length={p95} to fit 95% of rows, {most} for all"
        if report["kind"] == "sft":
            fix += "; data.too_long=drop skips long rows instead of truncating them"
        yield f"{', '.join(lost)}. {fix}"


def terminal_text(reports: list[Report], colour: bool) -> str:
    """Return all reports as text, each with a few rows of the file."""
    lines = []
    for report in reports:
        lines += [report["path"], "=" * min(100, len(report["path"]))]
        lines += [f"  {name}: {text}" for name, text in facts(report)]
        lines += _histogram(report)
        for broken in report["broken"][:MAX_BROKEN]:
            lines.append(f"  broken: line {broken['line']}: {broken['reason']}")
        if (more := len(report["broken"]) - MAX_BROKEN) > 0:
            lines.append(f"  ... {more:,} more; pass --json to list all")
        if not report["broken"] and not report["findings"] and not any(truncation_fixes(report)):
            lines.append("  nothing to fix")
        if report["examples"]:
            how = "blue and underlined" if colour else "between [[ and ]]"
            lines.append(f"  {how}: supervised tokens")
            paint = _paint if colour else _bracket
            for example in report["examples"]:
                painted = "".join(paint(text, in_loss) for text, in_loss in example["pieces"])
                part = f", {example['part']}" if "part" in example else ""
                lines += [f"  line {example['line']}{part}:", painted[:6000]]
        lines.append("")
    return "\n".join(lines)


def _histogram(report: Report) -> list[str]:
    bars = report["length_histogram"]
    most = max((bar["rows"] for bar in bars), default=0)
    first = next((i for i, bar in enumerate(bars) if bar["rows"]), 0)
    return [
        f"  {'< ' + format(bar['below'], ','):>12} {'█' * round(50 * bar['rows'] / most):<50} "
        f"{bar['rows']:,}"
        for bar in bars[first:]
    ]


def _paint(text: str, in_loss: bool) -> str:
    return (
        f"\x1b[4;34m{_printable(text)}\x1b[0m" if in_loss else f"\x1b[33m{_printable(text)}\x1b[0m"
    )


def _bracket(text: str, in_loss: bool) -> str:
    return f"[[{_printable(text)}]]" if in_loss else _printable(text)


def _printable(text: str) -> str:
    """Replace control characters in the data, which must not reach the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


MARK = '<meta name="generator" content="tools.inspect_data">'
"""Tag at the start of every page; only files that contain it are overwritten."""
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">{mark}<title>{title}</title>
<style>
body {{ font: 20px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
th {{ text-align: left; padding-right: 2em; vertical-align: top; font-weight: normal; color: #555 }}
pre {{ white-space: pre-wrap; background: #f6f6f6; padding: 1em; }}
.on {{ color: #0050a0; text-decoration: underline; }} .off {{ color: #a05000; }}
.bar {{ background: #0050a0; height: 1em; display: inline-block; }} .bad {{ color: #a05000; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def html_page(reports: list[Report]) -> str:
    """Return all reports as one self-contained HTML page."""
    parts = []
    for report in reports:
        parts.append(f"<h2>{html.escape(report['path'])}</h2><table>")
        parts += [
            f"<tr><th>{html.escape(name)}<td>{html.escape(text)}" for name, text in facts(report)
        ]
        parts.append("</table><table>")
        most = max((bar["rows"] for bar in report["length_histogram"]), default=1) or 1
        parts += [
            f"<tr><th>&lt; {bar['below']:,}<td><span class=bar "
            f"style='width:{30 * bar['rows'] / most:.2f}em'></span> {bar['rows']:,}"
            for bar in report["length_histogram"]
        ]
        parts.append("</table>")
        parts += [
            f"<p class=bad>line {broken['line']}: {html.escape(broken['reason'])}</p>"
            for broken in report["broken"]
        ]
        if report["examples"]:
            parts.append("<p>blue and underlined: supervised tokens</p>")
        for example in report["examples"]:
            painted = "".join(
                f"<span class={'on' if in_loss else 'off'}>{html.escape(text)}</span>"
                for text, in_loss in example["pieces"]
            )
            parts.append(f"<p>line {example['line']}</p><pre>{painted}</pre>")
    title, body = "Data report", "\n".join(parts)
    return PAGE.format(mark=MARK, title=title, body=body)
