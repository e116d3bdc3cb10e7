"""Page that shows how a model grew: its answers, skills and curve at each evaluation of its runs.

python -m tools.growth RUN... writes growth.html next to the first run. Pass the runs in order, such
as runs/demo/pretrain runs/demo/sft runs/demo/dpo. The page is one file and loads nothing else.
"""

from __future__ import annotations

import trainlib.core.threads  # noqa: F401  # Before torch.

import argparse
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tools.outputs import refuse_to_overwrite
from tools.past_runs import minutes_trained
from trainlib.core.errors import UserError
from trainlib.core.files import write_atomically
from trainlib.core.terminal import use_replacement_characters
from trainlib.engine.metrics import VAL_BITS_PER_BYTE, VAL_REWARD_ACCURACY, read_metrics
from trainlib.engine.run_folder import read_identity

TEMPLATE = Path(__file__).with_suffix(".html")
MARK = '<meta name="generator" content="tools.growth">'
"""Part of every page; only a file that has it is overwritten."""
DATA = "__DATA__"
SAMPLE = re.compile(r"sample step (\d+) (greedy|temperature [\d.]+): ?(.*)")
SKILL = re.compile(r"val/skills/([^/]+)(?:/([^/]+))?/exact_match")


def read_samples(log: Path) -> dict[int, list[dict[str, str]]]:
    """Return the samples in a train.log by step, each with `label` and `text`.

    A resumed run continues the log, so what was logged after the step of the resume is dropped.
    """
    found: dict[int, list[dict[str, str]]] = {}
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    for line in text.split("\n"):
        if resumed := re.fullmatch(r"resuming from step (\d+)", line):
            found = {step: samples for step, samples in found.items() if step <= int(resumed[1])}
        elif sample := SAMPLE.fullmatch(line):
            step, entry = int(sample[1]), {"label": sample[2], "text": unescape(sample[3])}
            found = {earlier: samples for earlier, samples in found.items() if earlier <= step}
            if entry not in found.setdefault(step, []):  # Killed before its first checkpoint.
                found[step].append(entry)
    return found


def unescape(text: str) -> str:
    """Return a text with the line breaks that the log writes as a backslash and n."""
    return text.replace("\\n", "\n")


def split_prompts(samples: dict[int, list[dict[str, str]]], chat: bool) -> None:
    """Split each text into `prompt` and `text`, in place.

    In a chat, the prompt is the first line. Otherwise it is what the samples of a prompt have in
    common at all evaluations, because the log does not separate a prompt from its continuation.
    """
    by_prompt: dict[int, list[dict[str, str]]] = {}
    for found in samples.values():
        counts = Counter[str]()
        for entry in found:  # The prompts have the same order under each label.
            by_prompt.setdefault(counts[entry["label"]], []).append(entry)
            counts[entry["label"]] += 1
    for entries in by_prompt.values():
        common = os.path.commonprefix([entry["text"] for entry in entries])
        for entry in entries:
            prompt, _, answer = entry["text"].partition("\n")
            if not chat:
                prompt, answer = common, entry["text"][len(common) :]
            entry.update(prompt=prompt, text=answer)


def read_run(folder: Path) -> dict[str, Any]:
    """Return what the page shows of a run; raise UserError if the folder holds no evaluation."""
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(
            f"{folder} is not a run: it has no metrics.jsonl. Pass run folders in order, such as "
            "runs/demo/pretrain runs/demo/sft runs/demo/dpo."
        )
    rows, samples = read_metrics(folder), read_samples(folder / "train.log")
    stage = read_identity(folder).get("stage", folder.resolve().name)
    split_prompts(samples, chat=stage != "pretrain")
    evaluations = []
    for row, minutes in zip(rows, minutes_trained(rows), strict=True):
        if any(name.startswith("val/") for name in row):
            skills: dict[str, dict[str, float]] = {}
            for name, value in row.items():
                if match := SKILL.fullmatch(name):
                    skills.setdefault(match[1], {})[match[2] or "trained"] = value
            evaluations.append({
                "step": row["step"],
                "minutes": minutes,
                "bits": row.get(VAL_BITS_PER_BYTE),
                "accuracy": row.get(VAL_REWARD_ACCURACY),
                "skills": skills,
                "samples": samples.get(int(row["step"]), []),
            })  # fmt: skip
    if not evaluations:
        raise UserError(f"{folder}: metrics.jsonl has no evaluation yet. Wait for the first one.")
    if (path := folder / "skills.json").is_file():  # All questions, with the weights in final/.
        evaluations[-1]["skills"] = skills = {}
        for name, counts in json.loads(path.read_text(encoding="utf-8")).items():
            kind, _, column = name.partition("/")
            skills.setdefault(kind, {})[column or "trained"] = counts["correct"] / counts["total"]
    path = folder / "baselines.json"
    baselines = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    name = folder.resolve().name
    return {"name": name, "stage": stage, "baselines": baselines, "evaluations": evaluations}


def page(runs: list[dict[str, Any]]) -> str:
    """Return the page. No text in the data can end the script that holds it."""
    data = json.dumps({"runs": runs}, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return TEMPLATE.read_text(encoding="utf-8").replace(DATA, data)


def write_page(folders: list[Path]) -> Path:
    """Write the page next to the first run and return its path.

    Raises UserError for a folder that is no run, or a growth.html that this tool did not write.
    """
    path = folders[0].resolve().parent / "growth.html"
    runs = [read_run(folder) for folder in folders]
    refuse_to_overwrite(path, MARK)
    write_atomically(path, page(runs))
    return path


def main() -> None:
    """Write the page of the runs on the command line."""
    use_replacement_characters()
    parser = argparse.ArgumentParser("python -m tools.growth", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, in order")
    try:
        print(write_page(parser.parse_args().runs))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
