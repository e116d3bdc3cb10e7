"""Speed of training beside that of the peers: same model, same rows, in turn, on this machine.

    python -m bench.training [FIGURE ...] --peers .venv-peers [--pairs 3] [--steps 6]

    packed   pretraining on full rows of 512, each as shipped, against transformers.Trainer
    same     the same, with the same dtype and matmul setting on both sides, uncompiled
    padded   real tokens on rows of 60 to 700 characters, against Trainer with dynamic padding
    sft      real tokens on the sample's conversations, against trl.SFTTrainer with packing
    dpo      pairs on the sample's preferences, against trl.DPOTrainer

The model is the default of 26.9M parameters. A pair of runs is ours, then the peer's; the ratio is
taken pair by pair. Ours is the stage script itself, its figure that of its metrics.jsonl over the
steps after the first two. Prints a table and appends a JSON record to bench/records.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / ".cache/bench/training"
SAMPLE = ROOT / "dataset/sample"
RECORDS = ROOT / "bench/records.jsonl"
ROWS, LENGTH, WARM = 8, 512, 2
FIGURES = {
    # figure: our script, data, the peer's figure, its matmul setting, ours
    "packed": ("train.py", SAMPLE / "pretrain.jsonl", "packed", "highest", []),
    "same": ("train.py", SAMPLE / "pretrain.jsonl", "packed", "medium", ["optim.name=adamw"]),
    "padded": ("train.py", PLACE / "short.jsonl", "padded", "highest", []),
    "sft": ("sft_train.py", SAMPLE / "sft.jsonl", "sft", "highest", []),
    "dpo": ("dpo_train.py", PLACE / "pairs.jsonl", "dpo", "highest", []),
}


def main() -> None:
    """Measure the figures asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("figures", nargs="*", default=list(FIGURES), metavar="FIGURE")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    prepare()
    for figure in options.figures:
        pairs = []
        for number in range(options.pairs):
            pairs.append((ours(figure, options.steps), theirs(figure, options)))
            print(f"{figure} {number + 1}: {pairs[-1][0]:,.1f} against {pairs[-1][1]:,.1f}/s",
                  flush=True)  # fmt: skip
        ratios = sorted(mine / other for mine, other in pairs)
        middle = statistics.median(ratios)
        print(f"{figure:<8} ratio {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)
        record = {"figure": figure, "ratio": middle, "pairs": pairs, **machine()}
        with RECORDS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def machine() -> dict[str, object]:
    """Where and when a record was made."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, check=False).stdout.strip()  # fmt: skip
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"), "commit": commit, "torch": torch.__version__,
        "cpu": names[0] if names else platform.processor(), "threads": torch.get_num_threads(),
    }  # fmt: skip


def prepare() -> None:
    """Weights to start from, and the data that the sample does not hold as it is."""
    PLACE.mkdir(parents=True, exist_ok=True)
    texts = [json.loads(line)["text"] for line in (SAMPLE / "pretrain.jsonl").open()]
    if not (PLACE / "short.jsonl").is_file():
        chance, flat = random.Random(0), "\n".join(texts)
        rows, place = [], 0
        while place < 1_000_000:  # Lengths even between 60 and 700 characters.
            size = chance.randint(60, 700)
            rows.append(json.dumps({"text": flat[place : place + size]}) + "\n")
            place += size
        (PLACE / "short.jsonl").write_text("".join(rows))
    if not (PLACE / "pairs.jsonl").is_file():
        lines = [x for x in (SAMPLE / "dpo.jsonl").open() if '"source": "ranked"' not in x]
        (PLACE / "pairs.jsonl").write_text("".join(lines[:2000]))
    if not (PLACE / "base/final").is_dir():
        shutil.rmtree(PLACE / "base", ignore_errors=True)
        run("train.py", SAMPLE / "pretrain.jsonl", "base", ["max_steps=1", "tokens_per_step=512"])


def run(script: str, data: Path, name: str, more: list[str]) -> list[dict]:
    """One run of a stage on the CPU; its lines of metrics."""
    out_dir = PLACE / name
    if name != "base":
        shutil.rmtree(out_dir, ignore_errors=True)
        # Its own pairs' reference is part of the measured work.
        shutil.rmtree(ROOT / ".cache/reference", ignore_errors=True)
    stage = {"train.py": "pretrain", "sft_train.py": "sft", "dpo_train.py": "dpo"}[script]
    words = [f"configs/{stage}.yaml", f"out_dir={out_dir}", f"data.files={data}", "device=cpu",
             "sequence_length=512", "save_every_steps=0", "eval_every_steps=0",
             "log_every_steps=1", "data.val_max_rows=1", *more]  # fmt: skip
    if script != "train.py":
        words.append(f"init_from={PLACE / 'base/final'}")
    subprocess.run([sys.executable, script, *words], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").open()]


def ours(figure: str, steps: int) -> float:
    """Real tokens a second of our script; of preferences, pairs."""
    script, data, _, _, more = FIGURES[figure]
    length = [f"max_steps={steps}", f"tokens_per_step={ROWS * LENGTH}"]
    if figure == "dpo":  # A row of ours is two answers long; eight pairs of at most 512 a step.
        length = [f"max_steps={steps}", f"tokens_per_step={4 * LENGTH}", "sequence_length=256"]
    rows = [r for r in run(script, data, "ours", [*length, *more]) if "train/loss" in r]
    seconds = tokens = 0.0
    for before, after in zip(rows[WARM - 1 :], rows[WARM:], strict=False):
        done = after["train/tokens"] - before["train/tokens"]
        tokens += done
        seconds += done / after["train/tokens_per_second"]
    if figure != "dpo":
        return tokens / seconds
    pairs = [json.loads(line) for line in data.open()]
    return tokens / seconds / tokens_of_a_pair(len(pairs))


def tokens_of_a_pair(count: int) -> float:
    """Mean positions of a pair, by what our cache holds of the file."""
    sys.path.insert(0, str(ROOT))
    from dataset import DataConfig, load_datasets
    from hf_folder import load_tokenizer

    config = DataConfig(files=(str(PLACE / "pairs.jsonl"),), val_max_rows=1)
    packed = load_datasets(config, "dpo", load_tokenizer(PLACE / "base/final"), 256, 0).train
    return packed.num_tokens / packed.num_units


def theirs(figure: str, options: argparse.Namespace) -> float:
    """The peer's figure."""
    _, data, name, matmul, _ = FIGURES[figure]
    command = [str(options.peers / "bin/python"), "bench/peers.py", name, "--data", str(data),
               "--model", str(PLACE / "base/final"), "--steps", str(options.steps),
               "--matmul", matmul]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"the peer failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["per_second"]


if __name__ == "__main__":
    main()
