"""How long until the loss that transformers.Trainer reaches in its budget: same data, model, cores.

    python -m bench.time_to_loss [--minutes 5] [--config FILE] [--set key=value ...] [--resume]
                                 [--rates A,B,C] [--peers .venv-peers]

1. The peer trains the model of --config with its AdamW for --minutes, once for each learning rate
   (linear decay, 2 % warm-up, rows joined and cut as run_clm does); its best validation counts.
2. Ours, the stage script with its own recipe, trains for a quarter of that time, and if that was
   enough for an eighth.

The validation text is the same documents for both, each alone in its row; the peer's bits per byte
are computed with transformers, ours are those of metrics.jsonl, and our final/ is held to them
by the peer's own evaluation. Ours computes as it is shipped; so does the peer, with matmul
"highest", but in bf16 where the CPU has its instructions, which is faster.
Time is training time: start and evaluations are left out for both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from bench.common import PEERS, PLACE, SAMPLE, base, peer, record, run
from tools.past_runs import minutes_trained
from trainlib.engine.metrics import VAL_BITS_PER_BYTE, read_metrics
from trainlib.engine.optim import fast_bfloat16

VAL_BYTES = 30_000
"""Of each validation file of the sample."""


def main() -> None:
    """Measure, and print one line a run."""
    parser = argparse.ArgumentParser(prog="python -m bench.time_to_loss", description=__doc__)
    parser.add_argument("--peers", type=Path, default=PEERS)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--config", default="configs/tiny_pretrain.yaml")
    parser.add_argument("--rates", default="3e-3,6e-3,12e-3")
    parser.add_argument("--set", nargs="*", default=[], help="settings of ours")
    parser.add_argument("--resume", action="store_true", help="keep the peer's runs of before")
    options = parser.parse_args()
    val = validation()
    start = base(options.config)  # The peer draws its own weights for that model.
    kept = PLACE / f"race_{Path(options.config).stem}_{options.minutes:g}min.jsonl"
    if not options.resume:
        kept.unlink(missing_ok=True)
    rates = options.rates.split(",")
    theirs = [json.loads(line) for line in kept.open()] if kept.is_file() else []
    theirs = [row for row in theirs if row["rate"] in rates]
    done = [row["rate"] for row in theirs]
    bf16 = ["--bf16"] if fast_bfloat16(torch.device("cpu")) else []
    for rate in rates:
        if rate in done:
            continue
        found = peer(options.peers, "loss", SAMPLE / "pretrain.jsonl", start, "--val", str(val),
                     "--rate", rate, "--minutes", str(options.minutes), *bf16)  # fmt: skip
        theirs.append({"rate": rate, **found})
        with kept.open("a") as file:
            file.write(json.dumps(theirs[-1]) + "\n")
        print(f"Trainer, AdamW {rate}: {found['bits_per_byte']:.3f} bits per byte after "
              f"{found['minutes']:.1f} min, {found['tokens']:,} tokens", flush=True)  # fmt: skip
    best = min(theirs, key=lambda row: row["bits_per_byte"])
    speed = own_speed(options, val)
    results = []
    for share in (4, 8):
        tokens = int(speed * options.minutes * 60 / share)
        result = ours(options, val, tokens, best["bits_per_byte"])
        results.append({"share": share, "tokens": tokens, **result})
        reached = result["reached"]
        words = f"reached after {reached:.2f} min" if reached else "not reached"
        print(f"ours, {result['minutes']:.2f} min: {result['bits_per_byte']:.3f} bits per byte, "
              f"{words}", flush=True)  # fmt: skip
        if not reached:
            break
    times = [row["reached"] for row in results if row["reached"]]
    ratios = [best["minutes"] / min(times)] if times else []
    record("time_to_loss", ratios, ">= 4", theirs=theirs, ours=results, config=options.config,
           minutes=options.minutes, set=options.set, peer_bf16=bool(bf16))  # fmt: skip
    kept.unlink()  # The race is over: --resume is for one that was cut off.


def validation() -> Path:
    """The first documents of each validation file of the sample, in one file."""
    path, rows = PLACE / "val.jsonl", []
    PLACE.mkdir(parents=True, exist_ok=True)
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
    """Tokens a second of the stage script, over twenty steps."""
    rows = run(
        "train.py",
        SAMPLE / "pretrain.jsonl",
        "speed",
        ["max_steps=20", "log_every_steps=10", f"data.val_files=[{val}]", *options.set],
        options.config,
    )
    return [row["train/tokens_per_second"] for row in rows if "train/loss" in row][-1]


def ours(options: argparse.Namespace, val: Path, tokens: int, target: float) -> dict:
    """A whole run of so many tokens: its last bits per byte, and when it first had the target."""
    words = [f"max_tokens={tokens}", "log_every_steps=1", "eval_every_steps=5",
             f"data.val_files=[{val}]", "data.val_max_rows=0", *options.set]  # fmt: skip
    run("train.py", SAMPLE / "pretrain.jsonl", "ours_loss", words, options.config)
    rows = read_metrics(PLACE / "ours_loss")
    reached = [
        (minutes, row[VAL_BITS_PER_BYTE])
        for minutes, row in zip(minutes_trained(rows), rows, strict=True)
        if VAL_BITS_PER_BYTE in row
    ]
    check = peer(options.peers, "evaluate", val, PLACE / "ours_loss/final")
    assert abs(check["bits_per_byte"] - reached[-1][1]) < 0.01, (check, reached[-1])
    first = next((minutes for minutes, value in reached if value <= target), None)
    return {"minutes": reached[-1][0], "bits_per_byte": reached[-1][1], "reached": first,
            "curve": reached}  # fmt: skip


if __name__ == "__main__":
    main()
