"""Figures of a finished demo: validation, skills, preferences, and exchanges with the model."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from model import Transformer, count_parameters
from tokenizer.bpe import Tokenizer
from tokenizer.chat_format import render_prompt
from tools.evaluate.answers import answers, held_out_prompts, repeats
from tools.past_runs import minutes_trained
from tools.prepare_data.skills import KINDS
from trainlib.core.hardware import cpu_name
from trainlib.data.formats import STAGES
from trainlib.data.messages import assistant
from trainlib.engine.metrics import VAL_LOSS, read_metrics
from trainlib.evaluation.skills import Question, load_questions
from trainlib.models.generate import Sampling, generate_batch
from trainlib.models.hf_folder import load_model, load_tokenizer

SAMPLE = Path("dataset/sample")
# Targets: maximum bits per byte, minimum accuracy. Missing a target is not an error.
AT_MOST = {"statutes": 1.55, "sanguo": 2.60, "shakespeare": 2.45}
AT_LEAST = {"behaviour": 0.72, "continuation": 0.55}
SKILLS_AT_LEAST = {"sum": 0.95, "difference": 0.95, "numeral_to_digits_zh": 0.95,
                   "digits_to_numeral_zh": 0.95, "json": 0.95, "larger": 0.90}  # fmt: skip
"""Minimum share of right answers in trained wordings; 0.90 of them in new combinations."""
NEW_COMBINATION, MEAN_AT_LEAST = 0.90, 0.75
TRAINED = [kind for kind, entry in KINDS.items() if entry.rows and entry.think]
"""All kinds but those that are never trained, and the sum without its steps."""
COLUMNS = 100
"""Width to which answers are truncated; Chinese characters take two columns."""
LEGEND = (
    "Targets are in parentheses. <- MISSED marks a value that misses its target, and <- LOWER a\n"
    "skill that DPO lowered by more than its interval."
)
QUICK = "A quick test with six steps for each stage: it misses the targets, and answers are noise."
WHO, OPEN = "你好，你是谁？", "怎样保持健康？"


def mark(reached: bool) -> str:
    """Return a marker if the target was missed, otherwise an empty string."""
    return "" if reached else "   <- MISSED"


def report(folder: Path, name: str, quick: bool) -> str:
    """Return the figures of the finished demo in a folder, and six exchanges with its model."""
    val = SAMPLE / "val" / "sft"
    prompts = held_out_prompts({val / f"{n}.jsonl": None for n in ("alpaca_zh", "alpaca_en")})
    models = {
        stage: (load_model(folder / stage / "final"), load_tokenizer(folder / stage / "final"))
        for stage in ("sft", "dpo")
    }
    rates = []
    for model, tokenizer in models.values():
        some = prompts[: 2 if quick else 50]
        rates.append(sum(repeats(ids) for ids, _ in answers(model, tokenizer, some)) / len(some))
    skills = {stage: read_json(folder / stage / "skills.json") for stage in models}
    return "\n".join(
        [
            *run_info(folder, models["dpo"][0]),
            QUICK if quick else LEGEND,
            "",
            *pretraining_figures(folder / "pretrain"),
            "",
            *sft_figures(folder / "sft"),
            "",
            *dpo_figures(folder / "dpo"),
            "",
            *skill_figures(skills["sft"], skills["dpo"]),
            "",
            "Held-out prompts whose greedy answer repeats itself: "
            f"SFT {rates[0]:.2f}, DPO {rates[1]:.2f} (less than SFT){mark(rates[1] < rates[0])}",
            "",
            "Chat, greedy, at most 128 tokens; only the question about itself was trained",
            *exchanges(*models["dpo"], name, load_questions([val / "skills.jsonl"])),
            "",
            conclusion(skills["dpo"]),
        ]
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def evaluations(run: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Return the first evaluation of a run, and that of the weights in final/."""
    found = [row for row in read_metrics(run) if VAL_LOSS in row]
    log = (run / "train.log").read_text(encoding="utf-8", errors="replace").splitlines()
    best = re.search(r"best at step (\d+).*final/ has these weights", log[-1]) if log else None
    step = int(best[1]) if best else found[-1]["step"]
    return found[0], next(row for row in found if row["step"] == step)


def run_info(folder: Path, model: Transformer) -> list[str]:
    """Return the date, the device, the model size and the minutes of training."""
    day = datetime.fromtimestamp((folder / "dpo" / "report.json").stat().st_mtime)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    minutes = [minutes_trained(read_metrics(folder / stage))[-1] for stage in STAGES]
    return [
        f"{day:%Y-%m-%d}, {device}, torch {torch.__version__}, "
        f"{count_parameters(model) / 1e6:.1f}M parameters",
        f"Minutes of training: {' + '.join(f'{m:.1f}' for m in minutes)} = {sum(minutes):.1f}",
    ]


def pretraining_figures(run: Path) -> list[str]:
    """Return the bits per byte of each source."""
    first, last = evaluations(run)
    lines = ["Pretraining, validation bits per byte, before -> after"]
    for key in sorted(
        key for key in last if key.endswith("/bits_per_byte") and key.count("/") == 2
    ):
        source = key.split("/")[1]
        limit = AT_MOST.get(source, math.inf)
        target = f"  (at most {limit:.2f})" if limit < math.inf else ""
        lines.append(
            f"  {source:<14}{first[key]:7.3f} -> {last[key]:.3f}{target}{mark(last[key] <= limit)}"
        )
    return lines


def sft_figures(run: Path) -> list[str]:
    """Return the validation loss of fine-tuning, before and of the weights that were kept."""
    first, kept = evaluations(run)
    step, last = int(kept["step"]), int(read_metrics(run)[-1]["step"])
    return [
        f"SFT, validation loss: {first[VAL_LOSS]:.3f} -> {kept[VAL_LOSS]:.3f} "
        f"at step {step} of {last}"
    ]


def dpo_figures(run: Path) -> list[str]:
    """Return the accuracy of each type of pair; types with few pairs are omitted."""
    table = read_json(run / "report.json")
    lines = ["DPO, held-out pairs: share with a reward margin above 0"]
    for kind, row in table.items():
        least = AT_LEAST.get(kind, 0.0)
        if kind.startswith("skill_") or row["n"] < 30 and not least:
            continue
        error = f" +- {row['standard_error']:.3f}" if row["standard_error"] else ""
        target = f"  (at least {least:.2f})" if least else ""
        lines += [
            f"  {kind:<14}{row['accuracy']:.3f}{error}  "
            f"n {row['n']}{target}{mark(row['accuracy'] >= least)}",
            f"  {'':<14}own preference {row['own_before']:.3f} -> {row['own_after']:.3f}, "
            f"best trivial rule ({row['rule']}) {row['rule_accuracy']:.3f}",
        ]
    return lines


def skill_figures(sft: dict[str, Any], dpo: dict[str, Any]) -> list[str]:
    """Return the number of right answers by kind: after SFT and DPO, by wording."""
    lines = [
        "Skills, right of held-out questions in trained wordings (95 % interval), in new",
        "combinations of trained words, and in new words",
        f"  {'':<22}{'after SFT':<38}after DPO",
    ]
    for kind in KINDS:
        cells, missed = [], False
        for table in (sft, dpo):
            if kind not in table:
                cells.append("-")
                continue
            row = table[kind]
            cell = f"{row['correct']:>3}/{row['total']} ({row['low']:.2f}-{row['high']:.2f})"
            for column in ("combination", "words"):
                other = table.get(f"{kind}/{column}", {"correct": 0, "total": 0})
                cell += f"  {other['correct']:>2}/{other['total']}"
            cells.append(cell)
        least = SKILLS_AT_LEAST.get(kind)
        if least and kind in dpo:
            missed = share(dpo, kind) < least or share(dpo, f"{kind}/combination") < NEW_COMBINATION
        target = f"  (at least {least:.2f})" if least else ""
        words = {"trained wordings": kind, "new combinations": f"{kind}/combination",
                 "new words": f"{kind}/words"}  # fmt: skip
        lower = [text for text, name in words.items() if name in sft and name in dpo
                 and share(dpo, name) < sft[name]["low"]
                 and dpo[name]["high"] < share(sft, name)]  # fmt: skip
        lines.append(
            f"  {kind:<22}{cells[0]:<38}{cells[1]}{target}{mark(not missed)}"
            + f"   <- LOWER in {' and '.join(lower)}" * bool(lower)
        )
    before, after = (sum(share(t, kind) for kind in TRAINED) / len(TRAINED) for t in (sft, dpo))
    text = f"  {f'mean of {len(TRAINED)} trained kinds':<22}  {before:<36.3f}{after:.3f}"
    target = f"  (at least {MEAN_AT_LEAST:.2f}){mark(after >= MEAN_AT_LEAST)}"
    return [*lines, text + target]


def share(table: dict[str, Any], kind: str) -> float:
    """Return the share of right answers of a kind; 0 if nothing was asked."""
    row = table.get(kind, {"correct": 0, "total": 0})
    return row["correct"] / max(1, row["total"])


def exchanges(
    model: Transformer, tokenizer: Tokenizer, name: str, questions: Sequence[Question]
) -> list[str]:
    """Return six questions and greedy answers: a sum with steps and without, a larger sum, ..."""

    def first(kind: str) -> Question:
        return next(q for q in questions if (q.kind, q.wording) == (kind, "trained"))

    total = first("sum")
    asked = [
        (total.prompt[-1]["content"], True, total.answer),
        (total.prompt[-1]["content"], False, total.answer),
        *(
            (q.prompt[-1]["content"], True, q.answer)
            for q in map(first, ("three_digit_sum", "json"))
        ),
        (WHO, True, None),
        (OPEN, True, None),
    ]
    prompts = [
        render_prompt(tokenizer, [{"role": "user", "content": question}], think)
        for question, think, _ in asked
    ]
    sampling = Sampling(temperature=0, max_new_tokens=128)
    lines = []
    for (question, think, right), ids in zip(
        asked, generate_batch(model, prompts, sampling, tokenizer.stop_ids), strict=True
    ):
        ended = ids[-1] in tokenizer.stop_ids
        text = tokenizer.show(ids[:-1] if ended else ids)
        content = assistant(text)["content"].strip()
        remarks = [
            "" if right is None else "right" if content == right else f"WRONG: {right}",
            "" if ended else "no end of turn",
            "repeats itself" if repeats(ids) else "",
            "WRONG: talks about itself" if question == OPEN and name in text else "",
        ]
        remark = ", ".join(filter(None, remarks))
        lines += [
            f"  user       {question}{'' if think else '  (--no-think)'}",
            f"  assistant  {cut(text, COLUMNS)}",
            *([f"             [{remark}]"] if remark else []),
        ]
    return lines


def conclusion(skills: dict[str, Any]) -> str:
    """Return one sentence on what the model can and cannot do."""
    can = [kind for kind in KINDS if share(skills, kind) >= 0.9]
    cannot = [kind for kind in KINDS if kind in skills and share(skills, kind) < 0.1]
    return (
        f"Of questions that it never saw, the model answers at least 9 of 10 right in "
        f"{', '.join(can) or 'no skill'}, and fewer than 1 of 10 in "
        f"{', '.join(cannot) or 'no skill'}; it knows no facts."
    )


def cut(text: str, columns: int) -> str:
    """Return a text on one line, truncated to `columns`; Chinese characters take two columns."""
    text, width = " / ".join(text.split("\n")), 0
    for index, char in enumerate(text):
        width += 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if width > columns:
            return text[:index] + " ..."
    return text


def fenced(lines: Sequence[str]) -> str:
    """Return lines as a fenced code block in Markdown."""
    return "\n".join(["```text", *(line.rstrip() for line in lines), "```"])


def summary(text: str) -> str:
    """Return a few lines of a report as a fenced code block for the READMEs."""
    lines = text.splitlines()

    def first(start: str) -> str:
        return next(line.strip() for line in lines if line.strip().startswith(start))

    bits = re.sub(r"^statutes +(\S+ -> \S+).*", r"\1", first("statutes"))
    skills = []
    for kind in (*SKILLS_AT_LEAST, "sum_direct", "three_digit_sum"):
        counts = [re.findall(r"[0-9]+/[0-9]+", line) for line in lines if f" {kind} " in line]
        skills += [f"{kind} {found[-3]}" for found in counts if len(found) > 2]
    accuracies = [" ".join(first(kind).split()[:2]) for kind in AT_LEAST]
    return fenced(
        [
            first("Minutes of training") + f"; {lines[0]}",
            f"Pretraining: held-out statutes, bits per byte {bits}",
            first("SFT, validation loss"),
            f"DPO, held-out pairs with a reward margin above 0: {', '.join(accuracies)}",
            f"Skills, right of held-out questions: {', '.join(skills[:4])},",
            f"  {', '.join(skills[4:])}",
            first("user"),
            first("assistant"),
        ]
    )
