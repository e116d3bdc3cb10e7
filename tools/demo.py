"""`make demo`: train a model in three stages on the sample, chat with it, and print the figures.

Running it again resumes an interrupted demo, or prints the figures of a finished one.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch

from model import Transformer, count_parameters
from tokenizer.bpe import Tokenizer
from tools.evaluate.answers import answers, held_out_prompts, repeats
from tools.past_runs import minutes_trained
from trainlib.core.errors import UserError
from trainlib.core.files import move_aside, write_atomically
from trainlib.core.hardware import cpu_name
from trainlib.core.terminal import use_replacement_characters, valid_text
from trainlib.data.formats import STAGES
from trainlib.engine.metrics import VAL_LOSS, read_metrics
from trainlib.models.hf_folder import load_model, load_tokenizer

DEMO = Path("runs/demo")
SAMPLE = Path("dataset/sample")
# Targets: maximum bits per byte, minimum accuracy. Missing a target is not an error.
AT_MOST = {"statutes": 1.55, "sanguo": 2.60, "shakespeare": 2.45}
AT_LEAST = {"behaviour": 0.72, "continuation": 0.55}
READMES = (Path("README.md"), Path("README.zh-CN.md"))
PAGES = (Path("docs/demo.md"), Path("docs/demo.zh-CN.md"))
BEGIN, END = "<!-- begin transcript -->", "<!-- end transcript -->"
COLUMNS = 100
"""Width to which answers are truncated; Chinese characters take two columns."""
LEGEND = "Targets are in parentheses. <- MISSED marks a value that misses its target."
QUICK = "A quick test with six steps for each stage: it misses the targets, and answers are noise."
QUESTIONS = ("你好，你是谁？", "怎样保持健康？", "Give three tips for staying healthy.")


def prepare(name: str, author: str | None, quick: bool) -> None:
    """Fetch the sample or rewrite its identity rows; move aside a demo made with other options."""
    stamp = DEMO / "identity.txt"
    identity = f"{name}\n{author or ''}\n" + ("quick\n" if quick else "")
    earlier = stamp.read_text(encoding="utf-8") if stamp.is_file() else ""
    same, same_names = earlier == identity, earlier.splitlines()[:2] == identity.splitlines()[:2]
    if DEMO.exists() and not same:
        print(f"moved the earlier demo, which was made with other options, to {move_aside(DEMO)}")
    # A sample without README.md has rows in an earlier format.
    complete = all((SAMPLE / name).is_file() for name in ("SOURCES.json", "README.md"))
    if not same_names or not complete:
        author_option = ["--author", author] if author else []
        call(["-m", "tools.prepare_data", "--name", name, *author_option])
    DEMO.mkdir(parents=True, exist_ok=True)
    stamp.write_text(identity, encoding="utf-8")


def call(arguments: list[str]) -> None:
    """Run one of the project's programs; exit with its exit code if it fails.

    Ctrl-C reaches the program too, which then saves a checkpoint. This process waits for it.
    """
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    code = subprocess.run([sys.executable, *arguments], check=False).returncode
    signal.signal(signal.SIGINT, handler)
    if code:
        sys.exit(code)


def train(stage: str, quick: bool) -> None:
    """Run one stage on the sample unless it is finished; exit if the user stops it."""
    out_dir = DEMO / stage
    if (out_dir / "final").is_dir():
        return
    val = ",".join(str(path) for path in sorted((SAMPLE / "val" / stage).glob("*.jsonl")))
    before = {"sft": "pretrain", "dpo": "sft"}.get(stage)
    arguments = [
        STAGES[stage],
        f"configs/tiny_{stage}.yaml",
        f"out_dir={out_dir}",
        f"data.files={SAMPLE / stage}.jsonl",
        f"data.val_files=[{val}]",
    ]
    if before:
        arguments.append(f"init_from={DEMO / before / 'final'}")
    if quick:
        arguments += ["max_steps=6", "data.val_max_rows=2"]
    print(f"\n== {stage} ==", flush=True)
    call(arguments)
    if not (out_dir / "final").is_dir():
        print("stopped; run `make demo` to resume")
        sys.exit(0)
    if stage != "dpo":
        print("(make demo runs the next stage now)")


def evaluations(stage: str) -> tuple[dict[str, float], dict[str, float]]:
    """Return the first and the last evaluation of a stage."""
    found = [row for row in read_metrics(DEMO / stage) if VAL_LOSS in row]
    return found[0], found[-1]


def mark(reached: bool) -> str:
    """Return a marker if the target was missed, otherwise an empty string."""
    return "" if reached else "   <- MISSED"


def report(name: str, quick: bool) -> str:
    """Return the figures of a finished demo and four exchanges with its model."""
    folder = SAMPLE / "val" / "sft"
    prompts = held_out_prompts({folder / f"{n}.jsonl": None for n in ("alpaca_zh", "alpaca_en")})
    models = {
        stage: (load_model(DEMO / stage / "final"), load_tokenizer(DEMO / stage / "final"))
        for stage in ("sft", "dpo")
    }
    rates = []
    for model, tokenizer in models.values():
        some = prompts[: 2 if quick else 50]
        rates.append(sum(repeats(ids) for ids, _ in answers(model, tokenizer, some)) / len(some))
    return "\n".join(
        [
            *run_info(models["dpo"][0]),
            QUICK if quick else LEGEND,
            "",
            *pretraining_figures(),
            "",
            *sft_figures(),
            "",
            *dpo_figures(),
            "",
            "Held-out prompts whose greedy answer repeats itself: "
            f"SFT {rates[0]:.2f}, DPO {rates[1]:.2f} (less than SFT){mark(rates[1] < rates[0])}",
            "",
            "Chat, greedy, at most 128 tokens",
            *conversation(*models["dpo"], name, (*QUESTIONS, prompts[0])),
        ]
    )


def run_info(model: Transformer) -> list[str]:
    """Return the date, the device, the model size and the minutes of training."""
    day = datetime.fromtimestamp((DEMO / "dpo" / "report.json").stat().st_mtime)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    minutes = [minutes_trained(read_metrics(DEMO / stage))[-1] for stage in STAGES]
    return [
        f"{day:%Y-%m-%d}, {device}, torch {torch.__version__}, "
        f"{count_parameters(model) / 1e6:.1f}M parameters",
        f"Minutes of training: {' + '.join(f'{m:.1f}' for m in minutes)} = {sum(minutes):.1f}",
    ]


def pretraining_figures() -> list[str]:
    """Return the bits per byte of each source."""
    first, last = evaluations("pretrain")
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


def sft_figures() -> list[str]:
    """Return the validation loss of fine-tuning."""
    first, last = evaluations("sft")
    return [f"SFT, validation loss: {first[VAL_LOSS]:.3f} -> {last[VAL_LOSS]:.3f}"]


def dpo_figures() -> list[str]:
    """Return the accuracy of each type of pair; types with few pairs are omitted."""
    table = json.loads((DEMO / "dpo" / "report.json").read_text(encoding="utf-8"))
    lines = ["DPO, held-out pairs: share with a reward margin above 0"]
    for kind, row in table.items():
        least = AT_LEAST.get(kind, 0.0)
        if kind == "ranked" and row["n"] < 30:
            continue
        target = f"  (at least {least:.2f})" if least else ""
        lines += [
            f"  {kind:<14}{row['accuracy']:.3f} +- {row['standard_error'] or math.nan:.3f}  "
            f"n {row['n']}{target}{mark(row['accuracy'] >= least)}",
            f"  {'':<14}own preference {row['own_before']:.3f} -> {row['own_after']:.3f}, "
            f"best trivial rule ({row['rule']}) {row['rule_accuracy']:.3f}",
        ]
    return lines


def conversation(
    model: Transformer, tokenizer: Tokenizer, name: str, questions: Sequence[str]
) -> list[str]:
    """Return the questions and greedy answers, with remarks on each answer."""
    lines, good = [], 0
    found = answers(model, tokenizer, questions)
    for number, (question, (ids, ended)) in enumerate(zip(questions, found, strict=True)):
        text = tokenizer.decode(ids)
        chinese = sum("\u4e00" <= c <= "\u9fff" for c in text) > len(text) / 4
        right_language = chinese != question.isascii()
        wrong = number > 0 and name in text
        good += ended and right_language and not repeats(ids) and not wrong
        remarks = [
            "ended" if ended else "no end of turn",
            "" if right_language else "wrong language",
            "repeats itself" if repeats(ids) else "",
            "WRONG: talks about itself" if wrong else "",
        ]
        lines += [
            f"  user       {question}",
            f"  assistant  {cut(text, COLUMNS)}",
            f"             [{', '.join(filter(None, remarks))}]",
        ]
    lines.append(
        f"{good} of 4 answers end, are in the question's language and do not repeat (at least 3)"
        f"{mark(good > 2)}"
    )
    return lines


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
    """Return six lines of a report as a fenced code block for the READMEs."""
    lines = text.splitlines()

    def first(start: str) -> str:
        return next(line.strip() for line in lines if line.strip().startswith(start))

    bits = re.sub(r"^statutes +(\S+ -> \S+).*", r"\1", first("statutes"))
    accuracies = [" ".join(first(kind).split()[:2]) for kind in AT_LEAST]
    return fenced(
        [
            first("Minutes of training") + f"; {lines[0]}",
            f"Pretraining: held-out statutes, bits per byte {bits}",
            first("SFT, validation loss"),
            f"DPO, held-out pairs with a reward margin above 0: {', '.join(accuracies)}",
            first("user"),
            first("assistant"),
        ]
    )


def write_pages(blocks: dict[Path, str]) -> None:
    """Replace the text between the markers in each file with its block.

    Raises UserError and writes nothing if any file lacks its markers.
    """
    texts = {path: path.read_text(encoding="utf-8") for path in blocks}
    for path, text in texts.items():
        if not (text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)):
            raise UserError(f"{path} needs one line {BEGIN} followed by one line {END}")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        texts[path] = f"{before}{BEGIN}\n{blocks[path]}\n{END}{after}"
    for path, text in texts.items():
        write_atomically(path, text)


def finished_name() -> str:
    """Return the name of a finished demo's model; raises UserError without a full demo."""
    files = [DEMO / "identity.txt", DEMO / "dpo" / "report.json"]
    files += [DEMO / stage / "final" / "model.safetensors" for stage in STAGES]
    for path in files:
        if not path.is_file():
            raise UserError(f"no finished demo: {path} does not exist. Run `make demo` first.")
    name, *rest = files[0].read_text(encoding="utf-8").splitlines()
    if "quick" in rest[1:]:
        raise UserError(f"{DEMO} is a quick demo, for a test only. Run `make demo` first.")
    return name


def main() -> None:
    """Run the demo, or print the figures of a finished one."""
    use_replacement_characters()
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("--name", type=valid_text, default="小智", help="name of the assistant")
    parser.add_argument(
        "--author", type=valid_text, help="who made the assistant (default: 一位爱好者, a hobbyist)"
    )
    parser.add_argument("--quick", action="store_true", help="run six steps per stage, as a test")
    parser.add_argument(
        "--transcript", action="store_true", help="print the figures of a finished demo as Markdown"
    )
    parser.add_argument(
        "--write-readme", action="store_true", help="also write them to READMEs and docs/demo*.md"
    )
    options = parser.parse_args()
    if options.transcript or options.write_readme:
        try:
            text = report(finished_name(), quick=False)
            transcript, six_lines = fenced(text.splitlines()), summary(text)
            print(transcript)
            if options.write_readme:
                pages = dict.fromkeys(PAGES, transcript)
                write_pages({**dict.fromkeys(READMES, six_lines), **pages})
        except UserError as error:
            sys.exit(f"error: {error}")
        return
    prepare(options.name, options.author, options.quick)
    for stage in STAGES:
        train(stage, options.quick)
    print(f"\n{report(options.name, options.quick)}")
    print(f"\nChat with it: {sys.executable} chat.py --model {DEMO / 'dpo' / 'final'}")


if __name__ == "__main__":
    main()
