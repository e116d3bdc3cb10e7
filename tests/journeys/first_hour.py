#!/usr/bin/env python3
"""A new user's first hour: every command in README.md that needs no GPU, exactly as written.

    python tests/journeys/first_hour.py

Clone the repository, run the demo with six steps per stage, then train three stages on small
files in dataset/, stop and resume the first one, chat, and open the model with transformers.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
ROWS = 300
SHORT = "max_steps=30 log_every_steps=1"
"""Added to the stage commands, which would otherwise train for minutes."""
MAX_SECONDS = 240


def block(word: str) -> str:
    """Return the only bash block in README.md that contains a word."""
    (found,) = [text for text in BLOCKS if word in text]
    return found


def run(script: str, folder: Path, stdin: str = "") -> str:
    """Run lines of README.md in bash, with a text on stdin; return their stdout."""
    print(f"\n$ {script}", flush=True)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, input=stdin, text=True,
        capture_output=True, encoding="utf-8", timeout=900,
    )  # fmt: skip
    print(done.stdout[-2000:], done.stderr[-1000:], flush=True)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}")
    return done.stdout


def answer(out: str) -> str:
    """Return what chat.py answered to the only question."""
    return re.split(r"(?:^|\n)> ", out)[1].strip()


def check(condition: bool, what: str) -> None:
    """Exit with an error if a condition does not hold."""
    if not condition:
        sys.exit(f"FAILED: {what}")


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON lines, as in the files that minimind publishes."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")


def write_data(folder: Path) -> None:
    """Write one file per stage in minimind's format."""
    text, talks, pairs = [], [], []
    for n in range(ROWS):
        question = {"role": "user", "content": f"{n} 加 {n % 7} 等于多少？"}
        right, wrong = (
            {"role": "assistant", "content": f"{n} 加 {n % 7} 等于 {n + n % 7 + error}。"}
            for error in (0, 3)
        )
        # Its rows hold several texts between markers; some of its conversations have no answer.
        one, two = (
            f"第{i}课。{i} 加 {n % 7} 等于 {i + n % 7}，满足交换律。" * 2 for i in (n, 2 * n)
        )
        text.append({"text": f"<|im_start|>{one}<|im_end|> <|im_start|>{two}<|im_end|>"})
        talks.append({"conversations": [question, right if n % 50 else {**right, "content": ""}]})
        pairs.append({"chosen": [question, right], "rejected": [question, wrong]})
    for name, rows in (("pretrain_hq", text), ("sft_mini_512", talks), ("dpo", pairs)):
        write_rows(folder / f"{name}.jsonl", rows)


def interrupt(command: str, folder: Path) -> None:
    """Start a command, send Ctrl-C after its third step, and wait until it has saved."""
    print(f"\n$ {command}   # Ctrl-C after step 3", flush=True)
    process = subprocess.Popen(["bash", "-c", f". .venv/bin/activate; exec {command}"], cwd=folder)
    log, end = folder / "runs/pretrain/train.log", time.monotonic() + 60
    while not (log.is_file() and "step 3 " in log.read_text(encoding="utf-8")):
        check(process.poll() is None and time.monotonic() < end, "the run reaches step 3")
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    check(process.wait(timeout=60) == 0, "Ctrl-C ends a run with exit code 0")
    check((folder / "runs/pretrain/latest").is_file(), "Ctrl-C saves a checkpoint")


def main() -> None:
    """Follow README.md from cloning to opening the model in transformers."""
    with tempfile.TemporaryDirectory() as name:
        demo = block("git clone").replace("REPOSITORY", f"{ROOT}/.git")
        demo = demo.replace("make demo\n", "make demo QUICK=1\n")
        check("QUICK=1" in demo, "README.md has a line `make demo`")
        out = run(demo, Path(name), stdin="你好，你是谁？\n/quit\n")
        check("Chat, greedy" in out, "the demo prints its figures")
        check(bool(answer(out)), "the demo model answers")

        folder, began = Path(name) / "train_llm_from_scratch", time.monotonic()
        write_data(folder / "dataset")
        activate, pretrain, sft, dpo, chat = block("configs/tiny_sft.yaml").splitlines()
        interrupt(f"{pretrain} {SHORT}", folder)
        out = run(f"{activate}; {pretrain} {SHORT}", folder)
        check("300 rows were split at markers into 600 documents" in out, "markers separate texts")
        check("resuming from" in out and "finished 30 steps" in out, "the same command resumes")
        check("already finished" in run(f"{activate}; {pretrain} {SHORT}", folder), "it runs once")
        out = run(f"{activate}; {sft} {SHORT}; {dpo} {SHORT}", folder)
        check("6 of 300 rows are not used: every answer is empty (6)" in out, "they are counted")
        out = run(f"{activate}; {chat}", folder, stdin="3 加 3 等于多少？\n/quit\n")
        check(bool(answer(out)), "the model answers")
        check(time.monotonic() - began < MAX_SECONDS, f"all this takes under {MAX_SECONDS} s")

        for file in ("mine.jsonl", "other.jsonl"):
            (folder / file).write_bytes((folder / "dataset/pretrain_hq.jsonl").read_bytes())
        run(f"{activate}; " + block("inspect_data").replace("max_hours=2", "max_steps=3"), folder)
        run(f"{activate}; " + block("--budget"), folder)
        out = run(f"{activate}; " + block("pip install transformers"), folder)
        # A model of 30 steps may write several lines, and end with empty ones.
        pip = r"^(?:Successfully installed|Requirement already satisfied).*$"
        text = re.split(pip, out, flags=re.MULTILINE)[-1]
        check(bool(text.strip()), "the model answers in transformers")
        print(f"\nfirst hour passed in {time.monotonic() - began:.0f} s after the demo")


if __name__ == "__main__":
    main()
