"""The data doctor's findings as lines for a terminal or a page, in English or Chinese.

TRAIN_LANG=zh or en chooses; without it the locale does. Colours are blue against orange with an
underline, which eyes of every kind tell apart.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Iterator
from typing import Any

Report = dict[str, Any]
MUCH = 0.10
"""A share of all tokens beyond the context from which on it is something to mend."""
MOST_BROKEN = 50
"""Broken rows that a terminal shows; --json has all."""


def _language() -> str:
    given = os.environ.get("TRAIN_LANG") or next(
        (v for k in ("LC_ALL", "LC_MESSAGES", "LANG") if (v := os.environ.get(k))), ""
    )
    return "zh" if given.lower().startswith("zh") else "en"


LANGUAGE = _language()

CHINESE = {
    "format": "格式",
    "unknown": "未知",
    "known formats": "可用格式见",
    "seen from": "依据",
    "rows": "行数",
    "broken": "损坏",
    "tokens": "词元",
    "under the loss": "计入损失",
    "estimated from a sample of": "抽样估计，样本行数",
    "bytes per token": "每词元字节数",
    "a vocabulary trained on this file would reach": "用此文件训练的词表可达",
    "type": "请运行",
    "length of a row": "每行长度（词元）",
    "least": "最短",
    "median": "中位",
    "most": "最长",
    "mean": "平均",
    "rows beyond the context of": "超出上下文的行，上下文为",
    "of all tokens": "占全部词元",
    "to mend: lost beyond the context": "需要修改：超出上下文而丢失",
    "holds 95 % of the rows": "可容纳 95 % 的行",
    "all": "可容纳全部",
    "leaves out whole rows": "则整行舍弃",
    "padding without packing": "不打包时的填充",
    "with packing": "打包后",
    "gain": "提速",
    "empty rows or answers": "空行或空回答",
    "rows without a supervised token in the context": "上下文内没有计入损失的词元",
    "exact duplicates": "完全重复",
    "near duplicates": "近似重复",
    "special tokens spelled out in content": "正文中出现特殊词元文本",
    "pairs of equal answers": "两个回答相同的偏好对",
    "pairs of different prompts": "提示不同的偏好对",
    "pairs that differ by template alone": "仅模板不同的偏好对",
    "lines": "行号",
    "scripts": "文字",
    "languages (rows)": "语言（行数）",
    "accuracy of trivial rules": "简单规则的准确率",
    "longer": "较长者",
    "shorter": "较短者",
    "more overlap": "与提示重叠更多者",
    "disk of the token cache": "词元缓存占用磁盘",
    "an epoch": "一轮训练",
    "steps of": "步，每步词元",
    "hours at": "小时，速度",
    "tokens per second": "词元/秒",
    "hours: not known (--tokens-per-second N)": "用时未知（--tokens-per-second N）",
    "as in": "来自",
    "line": "第几行",
    "and more, all in --json": "更多见 --json",
    "blue and underlined: under the loss": "蓝色下划线：计入损失",
    "nothing to mend": "没有需要修改的行",
    "Data report": "数据报告",
    "Chinese": "中文",
    "English or other Latin": "英文或其他拉丁文字",
    "Japanese": "日文",
    "Korean": "韩文",
    "Russian or other Cyrillic": "俄文或其他西里尔文字",
    "Han": "汉字",
    "Latin": "拉丁",
    "digits": "数字",
    "other": "其他",
    "none": "无",
}
FINDINGS = {
    "empty": "empty rows or answers",
    "no_supervised": "rows without a supervised token in the context",
    "exact_duplicates": "exact duplicates",
    "near_duplicates": "near duplicates",
    "special_text": "special tokens spelled out in content",
    "equal_pairs": "pairs of equal answers",
    "different_prompts": "pairs of different prompts",
    "template_pairs": "pairs that differ by template alone",
}


class Words:
    """Phrases in a language."""

    def __init__(self, language: str) -> None:
        self._table = CHINESE if language == "zh" else {}

    def __call__(self, phrase: str) -> str:
        return self._table.get(phrase, phrase)


def facts(report: Report, t: Words) -> Iterator[tuple[str, str]]:
    """(name, text) of everything but broken rows, histogram and examples."""
    kind = f"{report['format']} ({report['kind']})" if report["format"] else t("unknown")
    yield t("format"), kind
    if not report["format"] and report["rows"]:
        yield t("known formats"), "python -m tools.inspect_data --help"
    if report["why"]:
        yield t("seen from"), report["why"]
    yield t("rows"), f"{report['rows']:,}, {t('broken')} {len(report['broken']):,}"
    if not report["rows_looked_at"]:
        return
    sample = ""
    if report["sampled"]:
        sample = f"  ({t('estimated from a sample of')} {report['rows_looked_at']:,})"
    yield t("tokens"), f"{report['tokens']:,}{sample}"
    share = report["supervised_tokens"] / max(1, report["tokens"])
    yield t("under the loss"), f"{report['supervised_tokens']:,}  ({share:.1%})"
    yield t("bytes per token"), f"{report['bytes_per_token']:.3f}"
    if report["retrained_bytes_per_token"]:
        better = f"{report['retrained_bytes_per_token']:.3f}"
        if report["retrain_command"]:
            better += f"  {t('type')}: {report['retrain_command']}"
        yield t("a vocabulary trained on this file would reach"), better
    length = report["length"]
    yield t("length of a row"), "  ".join(f"{t(k)} {v:,.0f}" for k, v in length.items())
    yield (
        f"{t('rows beyond the context of')} {report['sequence_length']:,}",
        f"{report['truncated_rows']:.1%}  ({report['truncated_tokens']:.1%} {t('of all tokens')})",
    )
    yield (
        t("padding without packing"),
        f"{report['padding_unpacked']:.1%}  {t('with packing')} {report['padding_packed']:.1%}  "
        f"({t('gain')} {report['packing_gain']:.2f}x)",
    )
    for text in losses(report, t):
        yield t("to mend: lost beyond the context"), text
    for key, phrase in FINDINGS.items():
        finding = report[key]
        if finding["count"]:
            lines = ", ".join(map(str, finding["lines"]))
            more = " ..." if finding["count"] > len(finding["lines"]) else ""
            yield t(phrase), f"{finding['count']:,}  ({t('lines')} {lines}{more})"
    named = ((t(k), v) for k, v in report["scripts"].items() if v >= 0.001)
    yield t("scripts"), "  ".join(f"{k} {v:.1%}" for k, v in named)
    yield t("languages (rows)"), "  ".join(f"{t(k)} {v:,}" for k, v in report["languages"].items())
    if report["trivial_rules"]:
        rules = "  ".join(f"{t(k)} {v:.3f}" for k, v in report["trivial_rules"].items())
        yield t("accuracy of trivial rules"), rules
    yield t("disk of the token cache"), f"{report['cache_bytes'] / 1e6:,.1f} MB"
    steps = f"{report['steps_per_epoch']:,} {t('steps of')} {report['tokens_per_step']:,}"
    if report["hours_per_epoch"]:
        speed = f"{report['tokens_per_second']:,.0f} {t('tokens per second')}"
        if report["speed_of"]:
            speed += f" ({t('as in')} {report['speed_of']})"
        steps += f"; {report['hours_per_epoch']:,.2f} {t('hours at')} {speed}"
    else:
        steps += f"; {t('hours: not known (--tokens-per-second N)')}"
    yield t("an epoch"), steps


def losses(report: Report, t: Words) -> Iterator[str]:
    """What training would leave out for the length of its rows, with the cure."""
    if report["kind"] in (None, "pretrain"):
        return  # A document longer than a row goes on in the next.
    sequences = 2 if report["kind"] == "dpo" else 1
    lost = []
    if report["truncated_tokens"] > MUCH:
        lost.append(f"{report['truncated_tokens']:.1%} {t('of all tokens')}")
    if report["no_supervised"]["count"]:
        count = f"{report['no_supervised']['count']:,}"
        lost.append(f"{count} {t('rows without a supervised token in the context')}")
    if lost:
        most, least = (math.ceil(report["length"][k] / sequences) for k in ("most", "95%"))
        cure = f"sequence_length={least} {t('holds 95 % of the rows')}, {most} {t('all')}"
        if report["kind"] == "sft":
            cure += f"; data.too_long=drop {t('leaves out whole rows')}"
        yield f"{', '.join(lost)}. {cure}"


def terminal_text(reports: list[Report], language: str, colour: bool) -> str:
    """All reports, with a drawn histogram and a few rows in colour."""
    t, lines = Words(language), []
    for report in reports:
        lines += [report["path"], "=" * min(100, len(report["path"]))]
        lines += [f"  {name}: {text}" for name, text in facts(report, t)]
        lines += _histogram(report)
        for broken in report["broken"][:MOST_BROKEN]:
            lines.append(f"  {t('broken')}: {t('line')} {broken['line']}: {broken['reason']}")
        if len(report["broken"]) > MOST_BROKEN:
            lines.append(
                f"  ... {len(report['broken']) - MOST_BROKEN:,} {t('and more, all in --json')}"
            )
        if not report["broken"] and not any(losses(report, t)):
            lines.append(f"  {t('nothing to mend')}")
        if colour and report["examples"]:
            lines.append(f"  {t('blue and underlined: under the loss')}")
            for example in report["examples"]:
                painted = "".join(_paint(text, under) for text, under in example["pieces"])
                lines += [f"  {t('line')} {example['line']}:", painted[:6000]]
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


def _paint(text: str, under_loss: bool) -> str:
    # Control characters of the data must not command the terminal.
    text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    return f"\x1b[4;34m{text}\x1b[0m" if under_loss else f"\x1b[33m{text}\x1b[0m"


MARK = '<meta name="generator" content="tools.inspect_data">'
"""What every page begins with, so that no other file is taken for one."""
PAGE = """<!doctype html>
<html lang="{language}"><meta charset="utf-8">{mark}<title>{title}</title>
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


def html_page(reports: list[Report], language: str) -> str:
    """All reports as one page that needs nothing from elsewhere."""
    t, parts = Words(language), []
    for report in reports:
        parts.append(f"<h2>{html.escape(report['path'])}</h2><table>")
        parts += [
            f"<tr><th>{html.escape(name)}<td>{html.escape(text)}" for name, text in facts(report, t)
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
            f"<p class=bad>{t('line')} {broken['line']}: {html.escape(broken['reason'])}</p>"
            for broken in report["broken"]
        ]
        if report["examples"]:
            parts.append(f"<p>{t('blue and underlined: under the loss')}</p>")
        for example in report["examples"]:
            painted = "".join(
                f"<span class={'on' if under else 'off'}>{html.escape(text)}</span>"
                for text, under in example["pieces"]
            )
            parts.append(f"<p>{t('line')} {example['line']}</p><pre>{painted}</pre>")
    title, body = t("Data report"), "\n".join(parts)
    return PAGE.format(language=language, mark=MARK, title=title, body=body)
