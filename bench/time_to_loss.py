"""Training time until our model reaches the best loss of transformers.Trainer in a given time.

    python -m bench.time_to_loss [--minutes 5] [--config FILE] [--set key=value ...] [--resume]
                                 [--rates A,B,C] [--peers .venv-peers]

1. The peer trains the model in --config with its AdamW for --minutes, once per learning rate
   (linear decay, 2% warmup, rows concatenated and split as in run_clm). The target is the best of
   the final validation losses.
2. train.py trains the same model with our recipe for a quarter of that time and, if it reaches the
   target, again for an eighth. Both sides use the same data and the same cores.

Both validate on the same documents, each in its own row. Our bits per byte come from metrics.jsonl;
the peer's are computed with transformers, which also verifies our final model. Both use their
default precision (for the peer, matmul precision "highest"), except that the peer uses bf16, which
is faster, if the CPU has bf16 instructions. Startup and evaluation time is not counted.
"""

from __future__ import annotations

import trainlib.core.threads  # noqa: F401  # Before torch.

import argparse
import json
from pathlib import Path

import torch

from bench.common import PEERS, SAMPLE, WORK_DIR, base_model, record, run, run_peer
from tools.past_runs import minutes_trained
from trainlib.core.terminal import use_replacement_characters
from trainlib.engine.metrics import VAL_BITS_PER_BYTE, read_metrics
from trainlib.engine.optim import fast_bfloat16

VAL_BYTES = 30_000
"""Bytes read from each of the sample's validation files."""


def main() -> None:
    """Run the benchmark and print one line per run."""
    use_replacement_characters()
    parser = argparse.ArgumentParser(prog="python -m bench.time_to_loss", description=__doc__)
    parser.add_argument("--peers", type=Path, default=PEERS)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--config", default="configs/tiny_pretrain.yaml")
    parser.add_argument("--rates", default="3e-3,6e-3,12e-3")
    parser.add_argument("--set", nargs="*", default=[], help="settings for our runs")
    parser.add_argument("--resume", action="store_true", help="reuse the peer's finished runs")
    options = parser.parse_args()
    val = validation()
    start = base_model(options.config)  # The peer uses only its config; the weights are new.
    partial = WORK_DIR / f"race_{Path(options.config).stem}_{options.minutes:g}min.jsonl"
    if not options.resume:
        partial.unlink(missing_ok=True)
    rates = options.rates.split(",")
    theirs = [json.loads(line) for line in partial.open()] if partial.is_file() else []
    theirs = [row for row in theirs if row["rate"] in rates]
    done = [row["rate"] for row in theirs]
    bf16 = ["--bf16"] if fast_bfloat16(torch.device("cpu")) else []
    for rate in rates:
        if rate in done:
            continue
        found = run_peer(options.peers, "loss", SAMPLE / "pretrain.jsonl", start, "--val", str(val),
                         "--rate", rate, "--minutes", str(options.minutes), *bf16)  # fmt: skip
        theirs.append({"rate": rate, **found})
        with partial.open("a") as file:
            file.write(json.dumps(theirs[-1]) + "\n")
        print(f"Trainer, AdamW {rate}: {found['bits_per_byte']:.3f} bits per byte after "
              f"{found['minutes']:.1f} min, {found['tokens']:,} tokens", flush=True)  # fmt: skip
    best = min(theirs, key=lambda row: row["bits_per_byte"])
    speed = own_speed(options, val)
    results = []
    for share in (4, 8):
        tokens = int(speed * options.minutes * 60 / share)
        result = train_ours(options, val, tokens, best["bits_per_byte"])
        results.append({"share": share, "tokens": tokens, **result})
        reached = result["reached"]
        outcome = f"reached after {reached:.2f} min" if reached else "not reached"
        print(f"ours, {result['minutes']:.2f} min: {result['bits_per_byte']:.3f} bits per byte, "
              f"target {outcome}", flush=True)  # fmt: skip
        if not reached:
            break
    times = [row["reached"] for row in results if row["reached"]]
    ratios = [best["minutes"] / min(times)] if times else []
    record("time_to_loss", ratios, ">= 4", theirs=theirs, ours=results, config=options.config,
           minutes=options.minutes, set=options.set, peer_bf16=bool(bf16))  # fmt: skip
    partial.unlink()  # --resume is only for interrupted benchmarks.


def validation() -> Path:
    """Write the first documents from each of the sample's validation files to one file."""
    path, rows = WORK_DIR / "val.jsonl", []
    WORK_DIR.mkdir(parents=True, exist_ok=True)
    for file in sorted((SAMPLE / "val/pretrain").glob("*.jsonl")):
        size = 0
        for line in file.open(encoding="utf-8"):
            if size > VAL_BYTES:
                break
            size += len(line.encode())
            rows.append(line)
    path.write_text("".join(rows), encoding="utf-8")
    return path


def own_speed(options: argparse.Namespace, val: Path) -> float:
    """Return the tokens per second of train.py in a run of twenty steps."""
    rows = run(
        "train.py",
        SAMPLE / "pretrain.jsonl",
        "speed",
        ["max_steps=20", "log_every_steps=10", f"data.val_files=[{val}]", *options.set],
        options.config,
    )
    return [row["train/tokens_per_second"] for row in rows if "train/loss" in row][-1]


def train_ours(options: argparse.Namespace, val: Path, tokens: int, target: float) -> dict:
    """Train on `tokens` tokens; return the final bits per byte and when the target was reached."""
    words = [f"max_tokens={tokens}", "log_every_steps=1", "eval_every_steps=5",
             f"data.val_files=[{val}]", "data.val_max_rows=0", *options.set]  # fmt: skip
    run("train.py", SAMPLE / "pretrain.jsonl", "ours_loss", words, options.config)
    rows = read_metrics(WORK_DIR / "ours_loss")
    reached = [
        (minutes, row[VAL_BITS_PER_BYTE])
        for minutes, row in zip(minutes_trained(rows), rows, strict=True)
        if VAL_BITS_PER_BYTE in row
    ]
    check = run_peer(options.peers, "evaluate", val, WORK_DIR / "ours_loss/final")
    assert abs(check["bits_per_byte"] - reached[-1][1]) < 0.01, (check, reached[-1])
    first = next((minutes for minutes, value in reached if value <= target), None)
    return {"minutes": reached[-1][0], "bits_per_byte": reached[-1][1], "reached": first,
            "curve": reached}  # fmt: skip


if __name__ == "__main__":
    main()
