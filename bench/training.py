"""Training speed compared with the peers: same model and texts, in runs that alternate.

    python -m bench.training [NAME ...] [--peers .venv-peers] [--pairs 3] [--steps 6]

    packed   pretraining on full rows of 512, both with default settings, vs. transformers.Trainer
    same     the same, with AdamW, fp32 and the same matmul precision on both sides, uncompiled
    same_bf16      the same under bf16 autocast, if the CPU has bf16 instructions
    same_compiled  the same in fp32, both compiled
    padded   non-padding tokens on rows of 60 to 700 characters, vs. Trainer with dynamic padding
    padded_same    the same, with AdamW, fp32 and the same matmul precision, uncompiled
    sft      non-padding tokens on the sample's conversations, vs. trl.SFTTrainer with packing; its
             default concatenates all rows, which needs a large mask without FlashAttention
    sft_wrapped  the same, but the peer splits texts at row ends, which is faster here
    dpo      the sample's preference pairs, vs. trl.DPOTrainer

The model is the default one with 26.9M parameters. With default settings, the peer takes an AdamW
step every 4,096 tokens. We take a Muon step every 131,072 tokens in pretraining and every 32,768 in
fine-tuning, time the first step, and compile it if longer runs would be compiled. DPO is compiled
under the same condition; its steps have 4,096 positions. The peer's tokens also attend to earlier
documents in their row; ours do not. Each pair of runs, the peer's and then ours, gives one ratio.
Our throughput comes from metrics.jsonl, without the first two steps if a step has 4,096 tokens. In
DPO, both times include the reference log-probabilities. trl runs in bf16, its default, only if the
CPU has bf16 instructions, and without gradient checkpointing, which slows down a step.
"""

from __future__ import annotations

import trainlib.core.threads  # noqa: F401  # Before torch.

import itertools
import json
import random
import re
import shutil
from pathlib import Path

import torch

from bench.common import SAMPLE, WORK_DIR, base_model, make_parser, record, run, run_peer
from bench.step import cpu_choice
from dataset import DataConfig, load_datasets
from tools.past_runs import minutes_trained
from trainlib.core.terminal import use_replacement_characters
from trainlib.data.loader import StepLoader
from trainlib.engine.metrics import TRAIN_SPEED, TRAIN_TOKENS
from trainlib.engine.optim import fast_bfloat16
from trainlib.models.hf_folder import load_tokenizer

ROWS, LENGTH, WARMUP = 8, 512, 2
TRL = ("sft", "sft_wrapped", "dpo")
EQUAL = ["optim.name=adamw", "compile=off"]
FP32, BF16 = [*EQUAL, "precision=fp32"], [*EQUAL, "precision=bf16"]
COMPILED = ["optim.name=adamw", "precision=fp32", "compile=on"]
LONG_RUN = ["compile=on"] if fast_bfloat16(torch.device("cpu")) else []
"""Settings that "auto" chooses in runs of the usual length on this CPU, but not in short runs."""
MATMUL = ["--matmul", cpu_choice().matmul]
PACKED, SHORT, PAIRS = SAMPLE / "pretrain.jsonl", WORK_DIR / "short.jsonl", WORK_DIR / "pairs.jsonl"
BENCHMARKS = {
    # name: our script, data, the peer's benchmark and options, our settings, target ratio
    "packed": ("train.py", PACKED, "packed", [], LONG_RUN, ">= 2.2"),
    "same": ("train.py", PACKED, "packed", MATMUL, FP32, ">= 1.15"),
    "same_bf16": ("train.py", PACKED, "packed", [*MATMUL, "--bf16"], BF16, ">= 1.15"),
    "same_compiled": ("train.py", PACKED, "packed", [*MATMUL, "--compile"], COMPILED, ">= 1.05"),
    "padded": ("train.py", SHORT, "padded", [], LONG_RUN, ">= 3"),
    "padded_same": ("train.py", SHORT, "padded", MATMUL, FP32, ">= 1.8"),
    "sft": ("sft_train.py", SAMPLE / "sft.jsonl", "sft", [], LONG_RUN, ">= 1.3"),
    "sft_wrapped": ("sft_train.py", SAMPLE / "sft.jsonl", "sft_wrapped", [], LONG_RUN, ">= 1.3"),
    "dpo": ("dpo_train.py", PAIRS, "dpo", [], LONG_RUN, ">= 2"),
}


def main() -> None:
    """Run the selected benchmarks."""
    use_replacement_characters()
    parser = make_parser("training", __doc__, BENCHMARKS)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    prepare()
    bf16 = fast_bfloat16(torch.device("cpu"))
    for name in options.names or BENCHMARKS:
        _, data, peer_name, peer_options, _, aim = BENCHMARKS[name]
        if name == "same_bf16" and not bf16:
            print(f"{name}: skipped, because this CPU has no bf16 instructions")
            continue
        if bf16 and peer_name in TRL:
            peer_options = ["--bf16"]
        pairs = []
        for number in range(options.pairs):
            theirs = run_peer(options.peers, peer_name, data, base_model(), "--steps",
                              str(options.steps), *peer_options)["per_second"]  # fmt: skip
            pairs.append((own_throughput(name, options.steps), theirs))
            print(f"{name} {number + 1}: {pairs[-1][0]:,.1f}/s, peer {pairs[-1][1]:,.1f}/s",
                  flush=True)  # fmt: skip
        record(name, [mine / other for mine, other in pairs], aim, pairs=pairs)


def prepare() -> None:
    """Write the datasets derived from the sample: short rows and short pairs."""
    WORK_DIR.mkdir(parents=True, exist_ok=True)
    if not (WORK_DIR / "short.jsonl").is_file():
        texts = [json.loads(line)["text"] for line in (SAMPLE / "pretrain.jsonl").open()]
        rng, flat = random.Random(0), "\n".join(texts)
        rows, start = [], 0
        while start < 1_000_000:  # Lengths are uniform between 60 and 700 characters.
            size = rng.randint(60, 700)
            rows.append(json.dumps({"text": flat[start : start + size]}) + "\n")
            start += size
        (WORK_DIR / "short.jsonl").write_text("".join(rows))
    if not (WORK_DIR / "pairs.jsonl").is_file():
        # Short enough that we skip no pair and the peer truncates none.
        tokenizer = load_tokenizer(base_model())
        lines = (SAMPLE / "dpo.jsonl").open()
        short = (line for line in lines if len(tokenizer.encode(line)) < LENGTH - 40)
        (WORK_DIR / "pairs.jsonl").write_text("".join(itertools.islice(short, 2000)))


def own_throughput(name: str, steps: int) -> float:
    """Return the non-padding tokens per second of our script, or pairs per second for dpo."""
    script, data, _, _, more, _ = BENCHMARKS[name]
    if name == "dpo":
        return pairs_per_second(data, steps)
    if more is LONG_RUN:
        (row,) = (row for row in run(script, data, "ours", ["max_steps=1", *more])
                  if TRAIN_SPEED in row)  # fmt: skip
        return row[TRAIN_SPEED]
    words = [f"max_steps={steps}", f"tokens_per_step={ROWS * LENGTH}", *more]
    rows = [row for row in run(script, data, "ours", words) if TRAIN_SPEED in row]
    minutes = minutes_trained(rows)
    done = rows[-1][TRAIN_TOKENS] - rows[WARMUP - 1][TRAIN_TOKENS]
    return done / (minutes[-1] - minutes[WARMUP - 1]) / 60


def pairs_per_second(data: Path, steps: int) -> float:
    """Return pairs per second, including the time for the pairs' reference log-probabilities.

    Our rows have 512 positions (two answers of maximum length) and hold as many pairs as fit.
    """
    shutil.rmtree(WORK_DIR / "cache/reference", ignore_errors=True)
    words = [
        f"max_steps={steps}",
        f"tokens_per_step={ROWS * LENGTH}",
        f"sequence_length={LENGTH // 2}",
        *LONG_RUN,
    ]
    rows = run("dpo_train.py", data, "ours", words)
    log = (WORK_DIR / "ours/stdout.txt").read_text()
    found = re.search(r"reference: (\d+) answers computed in ([\d.]+) s", log)
    assert found is not None
    config = DataConfig(files=(str(data),), val_max_rows=1)
    tokenizer = load_tokenizer(WORK_DIR / "ours/final")
    packed = load_datasets(config, "dpo", tokenizer, LENGTH // 2, 0).train
    loader = StepLoader(packed, ROWS * LENGTH, ROWS)
    pairs = [next(loader).num_targets for _ in range(steps)]
    minutes = [m for m, row in zip(minutes_trained(rows), rows, strict=True) if "train/loss" in row]
    seconds = 60 * (minutes[-1] - minutes[WARMUP - 1])
    total = sum(pairs[WARMUP:])
    return total / (seconds + float(found[2]) * 2 * total / int(found[1]))


if __name__ == "__main__":
    main()
