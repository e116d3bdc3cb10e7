"""What `make demo` runs: real text, three stages, a chat with the result, and the figures.

Repeated, it goes on where it was stopped; after the end it prints the summary again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from generate import Sampling, generate_batch
from hf_folder import load_model
from model import Transformer
from tokenizer import Tokenizer
from tokenizer.chat_format import render_prompt
from trainlib.files import move_aside

DEMO = Path("runs/demo")
SAMPLE = Path("dataset/sample")
STAGES = {"pretrain": "train.py", "sft": "sft_train.py", "dpo": "dpo_train.py"}
# At most this many bits per byte, and at least this accuracy; a miss is marked, not an error.
AT_MOST = {"statutes": 1.80, "sanguo": 2.75, "shakespeare": 2.60}
AT_LEAST = {"behaviour": 0.72, "continuation": 0.55}
QUESTIONS = ("你好，你是谁？", "怎样保持健康？", "Give three tips for staying healthy.")


def prepare(name: str, author: str) -> None:
    """Fetch the sample, or rewrite its identity rows; a finished demo of another name moves."""
    stamp, wanted = DEMO / "identity.txt", f"{name}\n{author}\n"
    same = stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted
    if DEMO.exists() and not same:
        print(f"the demo that was there is now in {move_aside(DEMO)}")
    if not same or not (SAMPLE / "SOURCES.json").is_file():
        call(["-m", "tools.prepare_data", "--name", name, "--author", author])
    DEMO.mkdir(parents=True, exist_ok=True)
    stamp.write_text(wanted, encoding="utf-8")


def call(arguments: list[str]) -> None:
    """Run a program of the project; end as it ended where it failed."""
    code = subprocess.run([sys.executable, *arguments], check=False).returncode
    if code:
        sys.exit(code)


def train(stage: str, quick: bool) -> None:
    """Run one stage on the sample unless it is finished; end where it was stopped."""
    out_dir = DEMO / stage
    if (out_dir / "final").is_dir():
        if stage != "dpo" or (out_dir / "report.json").is_file():
            return
        move_aside(out_dir)  # Stopped between the model and its report, which it cannot make alone.
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
        print("stopped; `make demo` goes on from here")
        sys.exit(0)


def evaluations(stage: str) -> tuple[dict[str, float], dict[str, float]]:
    """First and last evaluation of a stage."""
    lines = (DEMO / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [row for row in map(json.loads, lines) if "val/loss" in row]
    return found[0], found[-1]


def repeats(ids: list[int], size: int = 8, times: int = 3) -> bool:
    """Whether some run of `size` ids stands at least `times` times in ids."""
    counts: dict[tuple[int, ...], int] = {}
    for start in range(len(ids) - size + 1):
        gram = tuple(ids[start : start + size])
        counts[gram] = counts.get(gram, 0) + 1
        if counts[gram] >= times:
            return True
    return False


def greedy(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str]
) -> list[tuple[list[int], bool]]:
    """Greedy answers of at most 128 tokens, each with whether it ended by itself."""
    ids = [render_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    sampling = Sampling(temperature=0, max_new_tokens=128)
    answers = generate_batch(model, ids, sampling, tokenizer.stop_ids)
    ended = [bool(answer) and answer[-1] in tokenizer.stop_ids for answer in answers]
    return [(a[:-1] if end else a, end) for a, end in zip(answers, ended, strict=True)]


def held_out_prompts() -> list[str]:
    """First user messages of the held-out alpaca conversations, Chinese first."""
    prompts = []
    for name in ("alpaca_zh", "alpaca_en"):
        path = SAMPLE / "val" / "sft" / f"{name}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines():
            prompts.append(json.loads(line)["conversations"][0]["content"])
    return prompts


def mark(fine: bool) -> str:
    """Nothing, or the mark of a missed figure."""
    return "" if fine else "   <- MISSED"


def summary(name: str, quick: bool) -> None:
    """Print the figures of a finished demo and four exchanges with the model."""
    first, last = evaluations("pretrain")
    print("\nPretraining, validation bits per byte, before -> after")
    for key in sorted(
        key for key in last if key.endswith("/bits_per_byte") and key.count("/") == 2
    ):
        source = key.split("/")[1]
        limit = AT_MOST.get(source, math.inf)
        wanted = f"  (at most {limit:.2f})" if limit < math.inf else ""
        print(
            f"  {source:<14}{first[key]:7.3f} -> {last[key]:.3f}{wanted}{mark(last[key] <= limit)}"
        )
    first, last = evaluations("sft")
    print(f"\nSFT, validation loss: {first['val/loss']:.3f} -> {last['val/loss']:.3f}")
    table = json.loads((DEMO / "dpo" / "report.json").read_text(encoding="utf-8"))
    print("\nDPO, held-out pairs: share with a reward margin above 0")
    for kind, row in table.items():
        least = AT_LEAST.get(kind, 0.0)
        if kind == "ranked" and row["n"] < 30:
            continue
        print(
            f"  {kind:<14}{row['accuracy']:.3f} +- {row['standard_error']:.3f}  n {row['n']}, "
            f"trained {row['trained'] or float('nan'):.3f}, own preference "
            f"{row['own_before']:.3f} -> {row['own_after']:.3f}, best trivial rule "
            f"({row['rule']}) {row['rule_accuracy']:.3f}{mark(row['accuracy'] >= least)}"
        )
    prompts = held_out_prompts()
    rates = []
    for stage in ("sft", "dpo"):
        model, tokenizer = load_model(DEMO / stage / "final"), Tokenizer(DEMO / stage / "final")
        some = prompts[: 2 if quick else 50]
        rates.append(sum(repeats(ids) for ids, _ in greedy(model, tokenizer, some)) / len(some))
    print(
        f"\nRepetition, share of held-out prompts whose greedy answer repeats itself: "
        f"SFT {rates[0]:.2f}, DPO {rates[1]:.2f}{mark(rates[1] < rates[0])}"
    )
    print("\nChat, greedy, at most 128 tokens")
    good = 0
    questions = (*QUESTIONS, prompts[0])
    answers = greedy(model, tokenizer, questions)
    for number, (question, (ids, ended)) in enumerate(zip(questions, answers, strict=True)):
        text = tokenizer.decode(ids)
        chinese = sum("\u4e00" <= c <= "\u9fff" for c in text) > len(text) / 4
        right_language = chinese != question.isascii()
        wrong = number > 0 and name in text
        fine = ended and right_language and not repeats(ids) and not wrong
        good += fine
        faults = [
            "" if ended else "no end of turn",
            "" if right_language else "other language",
            "repeats itself" if repeats(ids) else "",
            "WRONG: speaks of itself" if wrong else "",
        ]
        print(f"  user       {question}\n  assistant  {text}")
        print(f"             [{', '.join(fault for fault in faults if fault) or 'fine'}]")
    print(
        f"{good} of 4 end by themselves, in the language asked, without repetition{mark(good > 2)}"
    )
    print(f"\nTalk to it: python chat.py --model {DEMO / 'dpo' / 'final'}")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="小智", help="what the model calls itself")
    parser.add_argument("--author", default="我", help="who it says made it")
    parser.add_argument("--quick", action="store_true", help="six steps a stage, for a test")
    options = parser.parse_args()
    prepare(options.name, options.author)
    for stage in STAGES:
        train(stage, options.quick)
    summary(options.name, options.quick)


if __name__ == "__main__":
    main()
