"""Speed of training beside that of the peers: same sizes and texts, in turn, on this machine.

    python -m bench.training [NAME ...] [--peers .venv-peers] [--pairs 3] [--steps 6]

    packed   pretraining on full rows of 512, each as shipped, against transformers.Trainer
    same     the same, with AdamW, fp32 and one matmul setting on both sides, uncompiled
    same_bf16      the same under bf16's autocast, where the CPU has its instructions
    same_compiled  the same in fp32, both compiled
    padded   real tokens on rows of 60 to 700 characters, against Trainer with dynamic padding
    padded_same    the same with AdamW, fp32 and one matmul setting on both sides
    sft      real tokens on the sample's conversations, against trl.SFTTrainer with packing; its
             default lays all rows end to end, which without FlashAttention means one square mask
    sft_wrapped  the same, the peer packing by cutting at the row's end, faster for it here
    dpo      pairs on the sample's preferences, against trl.DPOTrainer

The model is the default of 26.9M parameters. "As shipped" the peer takes a step of AdamW every
4,096 tokens, which is its default, and ours one of Muon in the 131,072 of pretraining or 32,768 of
fine-tuning, of which the first is timed. Ours is compiled then, as a longer run is by itself; so it
is of DPO, in steps of 4,096 positions. In the peer's rows a token sees the documents before its own
as well; ours computes nothing there. A pair of runs is first the peer's, then ours; the ratio is
taken pair by pair. Ours is the stage script itself, its figure that of its metrics.jsonl, the first
two steps left out where a step is 4,096 tokens. Of DPO each side's reference log-probabilities are
part of the work that is timed, as each does it. trl computes in bf16, its default, where the CPU
has the instructions, and without gradient checkpointing, which makes a step slower.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
from pathlib import Path

import torch

from bench.common import PLACE, SAMPLE, base, parser_of, peer, record, run
from bench.step import chosen
from dataset import DataConfig, load_datasets
from tools.past_runs import minutes_trained
from trainlib.data.loader import StepLoader
from trainlib.engine.metrics import TRAIN_SPEED, TRAIN_TOKENS
from trainlib.engine.optim import fast_bfloat16
from trainlib.models.hf_folder import load_tokenizer

ROWS, LENGTH, WARM = 8, 512, 2
TRL = ("sft", "sft_wrapped", "dpo")
EQUAL = ["optim.name=adamw", "compile=off"]
FP32, BF16 = [*EQUAL, "precision=fp32"], [*EQUAL, "precision=bf16"]
COMPILED = ["optim.name=adamw", "precision=fp32", "compile=on"]
AS_LONG = ["compile=on"] if fast_bfloat16(torch.device("cpu")) else []
"""What a run of usual length does by itself on this CPU, and these of a few steps do not."""
MATMUL = ["--matmul", chosen().matmul]
PACKED, SHORT, PAIRS = SAMPLE / "pretrain.jsonl", PLACE / "short.jsonl", PLACE / "pairs.jsonl"
FIGURES = {
    # figure: our script, data, the peer's figure and settings, ours, what is wanted
    "packed": ("train.py", PACKED, "packed", [], AS_LONG, ">= 2.2"),
    "same": ("train.py", PACKED, "packed", MATMUL, FP32, ">= 1.15"),
    "same_bf16": ("train.py", PACKED, "packed", [*MATMUL, "--bf16"], BF16, ">= 1.15"),
    "same_compiled": ("train.py", PACKED, "packed", [*MATMUL, "--compile"], COMPILED, ">= 1.05"),
    "padded": ("train.py", SHORT, "padded", [], AS_LONG, ">= 3"),
    "padded_same": ("train.py", SHORT, "padded", MATMUL, FP32, ">= 1.8"),
    "sft": ("sft_train.py", SAMPLE / "sft.jsonl", "sft", [], AS_LONG, ">= 1.3"),
    "sft_wrapped": ("sft_train.py", SAMPLE / "sft.jsonl", "sft_wrapped", [], AS_LONG, ">= 1.3"),
    "dpo": ("dpo_train.py", PAIRS, "dpo", [], AS_LONG, ">= 2"),
}


def main() -> None:
    """Measure the figures asked for."""
    parser = parser_of("training", __doc__, FIGURES)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    prepare()
    bf16 = fast_bfloat16(torch.device("cpu"))
    for figure in options.names or FIGURES:
        _, data, name, settings, _, aim = FIGURES[figure]
        if figure == "same_bf16" and not bf16:
            print(f"{figure}: left out, as this CPU has no bf16 instructions")
            continue
        if bf16 and name in TRL:
            settings = ["--bf16"]
        pairs = []
        for number in range(options.pairs):
            theirs = peer(options.peers, name, data, base(), "--steps", str(options.steps),
                          *settings)["per_second"]  # fmt: skip
            pairs.append((ours(figure, options.steps), theirs))
            print(f"{figure} {number + 1}: {pairs[-1][0]:,.1f} against {pairs[-1][1]:,.1f}/s",
                  flush=True)  # fmt: skip
        record(figure, [mine / other for mine, other in pairs], aim, pairs=pairs)


def prepare() -> None:
    """The data that the sample does not hold as it is."""
    PLACE.mkdir(parents=True, exist_ok=True)
    if not (PLACE / "short.jsonl").is_file():
        texts = [json.loads(line)["text"] for line in (SAMPLE / "pretrain.jsonl").open()]
        chance, flat = random.Random(0), "\n".join(texts)
        rows, place = [], 0
        while place < 1_000_000:  # Lengths even between 60 and 700 characters.
            size = chance.randint(60, 700)
            rows.append(json.dumps({"text": flat[place : place + size]}) + "\n")
            place += size
        (PLACE / "short.jsonl").write_text("".join(rows))
    if not (PLACE / "pairs.jsonl").is_file():
        # Of a length that both sides take whole: ours leaves out, the peer cuts.
        tokenizer = load_tokenizer(base())
        lines = (SAMPLE / "dpo.jsonl").open()
        short = (line for line in lines if len(tokenizer.encode(line)) < LENGTH - 40)
        (PLACE / "pairs.jsonl").write_text("".join(itertools.islice(short, 2000)))


def ours(figure: str, steps: int) -> float:
    """Real tokens a second of our script; of preferences, pairs."""
    script, data, _, _, more, _ = FIGURES[figure]
    if figure == "dpo":
        return pairs_per_second(data, steps)
    if more is AS_LONG:
        (row,) = (row for row in run(script, data, "ours", ["max_steps=1", *more])
                  if TRAIN_SPEED in row)  # fmt: skip
        return row[TRAIN_SPEED]
    words = [f"max_steps={steps}", f"tokens_per_step={ROWS * LENGTH}", *more]
    rows = [row for row in run(script, data, "ours", words) if TRAIN_SPEED in row]
    minutes = minutes_trained(rows)
    done = rows[-1][TRAIN_TOKENS] - rows[WARM - 1][TRAIN_TOKENS]
    return done / (minutes[-1] - minutes[WARM - 1]) / 60


def pairs_per_second(data: Path, steps: int) -> float:
    """Pairs a second over all steps of a run and the reference of just these pairs.

    A row of ours is two answers of at most 256 positions long and holds as many pairs as fit.
    """
    shutil.rmtree(PLACE / "cache/reference", ignore_errors=True)
    words = [
        f"max_steps={steps}",
        f"tokens_per_step={ROWS * LENGTH}",
        f"sequence_length={LENGTH // 2}",
        *AS_LONG,
    ]
    rows = run("dpo_train.py", data, "ours", words)
    told = (PLACE / "ours/stdout.txt").read_text()
    found = re.search(r"reference: (\d+) answers computed in ([\d.]+) s", told)
    assert found is not None
    config = DataConfig(files=(str(data),), val_max_rows=1)
    tokenizer = load_tokenizer(PLACE / "ours/final")
    packed = load_datasets(config, "dpo", tokenizer, LENGTH // 2, 0).train
    loader = StepLoader(packed, ROWS * LENGTH, ROWS)
    pairs = [next(loader).num_targets for _ in range(steps)]
    minutes = [m for m, row in zip(minutes_trained(rows), rows, strict=True) if "train/loss" in row]
    seconds = 60 * (minutes[-1] - minutes[WARM - 1])
    return sum(pairs[WARM:]) / (seconds + float(found[2]) * 2 * sum(pairs[WARM:]) / int(found[1]))


if __name__ == "__main__":
    main()
