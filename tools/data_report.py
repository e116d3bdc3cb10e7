"""Data doctor reports, as terminal text or an HTML page, in English or Chinese.

TRAIN_LANG=zh or TRAIN_LANG=en sets the language; by default, the locale determines it. Supervised
text is blue and underlined, other text orange, which colour-blind readers can distinguish.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Iterator
from typing import Any

Report = dict[str, Any]
MAX_TRUNCATED = 0.10
"""Share of all tokens that may be truncated before the report suggests a fix."""
MAX_BROKEN = 50
"""Maximum number of broken rows shown in the terminal; --json lists all."""


def _language() -> str:
    locale = os.environ.get("TRAIN_LANG") or next(
        (v for k in ("LC_ALL", "LC_MESSAGES", "LANG") if (v := os.environ.get(k))), ""
    )
    return "zh" if locale.lower().startswith("zh") else "en"


LANGUAGE = _language()

CHINESE = {
    "format": "格式",
    "unknown": "未知",
    "known formats": "可用格式见",
    "detected from": "依据",
    "rows": "行数",
    "broken": "损坏",
    "tokens": "词元",
    "supervised tokens": "计入损失",
    "estimated; rows in the sample": "抽样估计，样本行数",
    "bytes per token": "每词元字节数",
    "bytes per token with a vocabulary trained on this file": "用此文件训练的词表可达",
    "run": "请运行",
    "tokens per row": "每行长度（词元）",
    "least": "最短",
    "median": "中位",
    "most": "最长",
    "mean": "平均",
    "rows longer than the context of": "超出上下文的行，上下文为",
    "of all tokens": "占全部词元",
    "to fix (lost to truncation)": "需要修改：超出上下文而丢失",
    "Set": "设",
    "to fit 95% of rows": "可容纳 95 % 的行",
    "for all": "可容纳全部",
    "skips long rows instead of truncating them": "则整行舍弃",
    "padding without packing": "不打包时的填充",
    "with packing": "打包后",
    "speedup": "提速",
    "empty rows or answers": "空行或空回答",
    "rows without a supervised token in the context": "上下文内没有计入损失的词元",
    "exact duplicates": "完全重复",
    "near duplicates": "近似重复",
    "rows with the text of a special token": "正文中出现特殊词元文本",
    "pairs with identical answers": "两个回答相同的偏好对",
    "pairs with different prompts": "提示不同的偏好对",
    "pairs that differ only in formatting": "仅模板不同的偏好对",
    "lines": "行号",
    "scripts": "文字",
    "languages (rows)": "语言（行数）",
    "accuracy of trivial baselines": "简单规则的准确率",
    "longer": "较长者",
    "shorter": "较短者",
    "more overlap": "与提示重叠更多者",
    "token cache on disk": "词元缓存占用磁盘",
    "one epoch": "一轮训练",
    "steps of": "步，每步",
    "hours at": "小时，速度",
    "tokens per second": "词元/秒",
    "hours unknown (pass --tokens-per-second N)": "用时未知（--tokens-per-second N）",
    "measured in": "来自",
    "line": "第几行",
    "more; pass --json to list all": "行未显示，完整列表见 --json",
    "blue and underlined: supervised tokens": "蓝色下划线：计入损失",
    "nothing to fix": "没有需要修改的行",
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
    "special_text": "rows with the text of a special token",
    "equal_pairs": "pairs with identical answers",
    "different_prompts": "pairs with different prompts",
    "template_pairs": "pairs that differ only in formatting",
}


class Translator:
    """Translates the English phrases of a report into its language."""

    def __init__(self, language: str) -> None:
        self._table = CHINESE if language == "zh" else {"least": "min", "most": "max"}

    def __call__(self, phrase: str) -> str:
        return self._table.get(phrase, phrase)


def facts(report: Report, t: Translator) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for everything except broken rows, the histogram and examples."""
    name = f"{report['format']} ({report['kind']})" if report["format"] else t("unknown")
    yield t("format"), name
    if not report["format"] and report["rows"]:
        yield t("known formats"), "python -m tools.inspect_data --help"
    if report["why"]:
        yield t("detected from"), report["why"]
    yield t("rows"), f"{report['rows']:,}  ({t('broken')}: {len(report['broken']):,})"
    if not report["rows_looked_at"]:
        return
    sample = ""
    if report["sampled"]:
        sample = f"  ({t('estimated; rows in the sample')}: {report['rows_looked_at']:,})"
    yield t("tokens"), f"{report['tokens']:,}{sample}"
    share = report["supervised_tokens"] / max(1, report["tokens"])
    yield t("supervised tokens"), f"{report['supervised_tokens']:,}  ({share:.1%})"
    yield t("bytes per token"), f"{report['bytes_per_token']:.3f}"
    if report["retrained_bytes_per_token"]:
        retrained = f"{report['retrained_bytes_per_token']:.3f}"
        if report["retrain_command"]:
            retrained += f"  {t('run')}: {report['retrain_command']}"
        yield t("bytes per token with a vocabulary trained on this file"), retrained
    length = report["length"]
    yield t("tokens per row"), "  ".join(f"{t(k)} {v:,.0f}" for k, v in length.items())
    yield (
        f"{t('rows longer than the context of')} {report['sequence_length']:,}",
        f"{report['truncated_rows']:.1%}  ({report['truncated_tokens']:.1%} {t('of all tokens')})",
    )
    yield (
        t("padding without packing"),
        f"{report['padding_unpacked']:.1%}  {t('with packing')} {report['padding_packed']:.1%}  "
        f"({t('speedup')} {report['packing_gain']:.2f}x)",
    )
    for text in truncation_fixes(report, t):
        yield t("to fix (lost to truncation)"), text
    for key, phrase in FINDINGS.items():
        finding = report[key]
        if finding["count"]:
            lines = ", ".join(map(str, finding["lines"]))
            more = " ..." if finding["count"] > len(finding["lines"]) else ""
            yield t(phrase), f"{finding['count']:,}  ({t('lines')} {lines}{more})"
    shown = ((t(k), v) for k, v in report["scripts"].items() if v >= 0.001)
    yield t("scripts"), "  ".join(f"{k} {v:.1%}" for k, v in shown)
    yield t("languages (rows)"), "  ".join(f"{t(k)} {v:,}" for k, v in report["languages"].items())
    if report["trivial_rules"]:
        rules = "  ".join(f"{t(k)} {v:.3f}" for k, v in report["trivial_rules"].items())
        yield t("accuracy of trivial baselines"), rules
    yield t("token cache on disk"), f"{report['cache_bytes'] / 1e6:,.1f} MB"
    steps = f"{report['steps_per_epoch']:,} {t('steps of')} {report['tokens_per_step']:,}"
    steps += f" {t('tokens')}"
    if report["hours_per_epoch"]:
        speed = f"{report['tokens_per_second']:,.0f} {t('tokens per second')}"
        if report["speed_of"]:
            speed += f" ({t('measured in')} {report['speed_of']})"
        steps += f"; {report['hours_per_epoch']:,.2f} {t('hours at')} {speed}"
    else:
        steps += f"; {t('hours unknown (pass --tokens-per-second N)')}"
    yield t("one epoch"), steps


def truncation_fixes(report: Report, t: Translator) -> Iterator[str]:
    """Yield descriptions of what training would lose to truncation, and how to avoid it."""
    if report["kind"] in (None, "pretrain"):
        return  # A document longer than a row continues in the next one.
    sequences = 2 if report["kind"] == "dpo" else 1
    lost = []
    if report["truncated_tokens"] > MAX_TRUNCATED:
        lost.append(f"{report['truncated_tokens']:.1%} {t('of all tokens')}")
    if report["no_supervised"]["count"]:
        count = f"{report['no_supervised']['count']:,}"
        lost.append(f"{count} {t('rows without a supervised token in the context')}")
    if lost:
        most, p95 = (math.ceil(report["length"][k] / sequences) for k in ("most", "95%"))
        fix = f"{t('Set')} sequence_length={p95} {t('to fit 95% of rows')}, {most} {t('for all')}"
        if report["kind"] == "sft":
            fix += f"; data.too_long=drop {t('skips long rows instead of truncating them')}"
        yield f"{', '.join(lost)}. {fix}"


def terminal_text(reports: list[Report], language: str, colour: bool) -> str:
    """Return all reports as text; with `colour`, each also shows a few rows of the file."""
    t, lines = Translator(language), []
    for report in reports:
        lines += [report["path"], "=" * min(100, len(report["path"]))]
        lines += [f"  {name}: {text}" for name, text in facts(report, t)]
        lines += _histogram(report)
        for broken in report["broken"][:MAX_BROKEN]:
            lines.append(f"  {t('broken')}: {t('line')} {broken['line']}: {broken['reason']}")
        if (more := len(report["broken"]) - MAX_BROKEN) > 0:
            lines.append(f"  ... {more:,} {t('more; pass --json to list all')}")
        if not report["broken"] and not any(truncation_fixes(report, t)):
            lines.append(f"  {t('nothing to fix')}")
        if colour and report["examples"]:
            lines.append(f"  {t('blue and underlined: supervised tokens')}")
            for example in report["examples"]:
                painted = "".join(_paint(text, in_loss) for text, in_loss in example["pieces"])
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


def _paint(text: str, in_loss: bool) -> str:
    # Control characters in the data must not reach the terminal.
    text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    return f"\x1b[4;34m{text}\x1b[0m" if in_loss else f"\x1b[33m{text}\x1b[0m"


MARK = '<meta name="generator" content="tools.inspect_data">'
"""Tag at the start of every page; only files that contain it are overwritten."""
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
    """Return all reports as one self-contained HTML page."""
    t, parts = Translator(language), []
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
            parts.append(f"<p>{t('blue and underlined: supervised tokens')}</p>")
        for example in report["examples"]:
            painted = "".join(
                f"<span class={'on' if in_loss else 'off'}>{html.escape(text)}</span>"
                for text, in_loss in example["pieces"]
            )
            parts.append(f"<p>{t('line')} {example['line']}</p><pre>{painted}</pre>")
    title, body = t("Data report"), "\n".join(parts)
    return PAGE.format(language=language, mark=MARK, title=title, body=body)
