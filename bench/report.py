"""Write docs/benchmarks.md from bench/records.jsonl: the last record of each figure.

Machine by machine, the one that was measured last first; then the ablations of
bench/ablations.jsonl.

    python -m bench.report [docs/benchmarks.md]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from bench.ablations import CENTRE, CHANGES, FIGURE, up_to_date
from bench.common import RECORDS, ROOT

WHAT = {
    "packed": "tokens/s on full rows of 512, 26.9M, over transformers.Trainer, each as shipped, but"
    " ours compiled where a longer run is (until 2026-11-25 with a step in 16,384 tokens)",
    "same": "the same, AdamW, fp32 and one matmul setting on both sides, uncompiled",
    "same_bf16": "the same, both under bf16's autocast",
    "same_compiled": "the same in fp32, both compiled",
    "padded": "real tokens/s on rows of 60 to 700 characters, over Trainer's dynamic padding, else"
    " as packed",
    "padded_same": "the same, AdamW, fp32 and one matmul setting on both sides",
    "sft": "real tokens/s of fine-tuning, over trl.SFTTrainer with packing as it is by default,"
    " else as packed",
    "sft_wrapped": "the same, over its other packing, which is faster without FlashAttention",
    "dpo": "pairs/s of preference optimisation with its reference, over trl.DPOTrainer, ours"
    " compiled as in packed",
    "mfu": "model FLOP utilisation: share of the best matrix product measured in the same run, of a"
    " step as shipped (until 2026-11-25 of 16,384 tokens)",
    "mfu_plain": "the same, uncompiled",
    "mfu_fp32": "the same in fp32, uncompiled",
    "time_to_loss": "how many times sooner the loss of Trainer's best AdamW run is reached",
    "checkpoint": "share of training time that saving every 200th step takes, 26.9M; below 0.001 it"
    " is noise",
    "start": "seconds from the command to the first step, data cached, not compiled",
    "memory": "peak bytes of a step of 8 rows of 512 over transformers' step, fp32",
}
"""Every figure with a line in the table, in the order of the page."""


INTRODUCTION = """# Benchmarks

Written by `python -m bench.report` from the records that `make bench` and `make bench-long` append
to `bench/records.jsonl` and `bench/ablations.jsonl`. Given are the median of the repeats, the
smallest and the largest. Ours and the peer's run in turn, and a ratio is taken pair by pair.
Peers: the versions of `bench/requirements-peers.txt`. No GPU has been measured yet.

What a figure is made of stands in the first lines of its program: `bench/training.py`,
`bench/costs.py`, `bench/time_to_loss.py`, `bench/ablations.py`."""

NOTES = """## What made it faster or smaller

Kept by hand in `bench/report.py`; each was measured when it was made, on two cores of an EPYC with
AVX-512 and bf16 instructions or of one without either, or stands in the code beside what it
explains.

* bf16 or fp32 is chosen by a measurement, once a machine. With the instructions a product of bf16
  takes half the time of one of fp32 (390 against 200 GFLOP/s); without them it is far slower.
* Products of fp32 under `set_float32_matmul_precision("medium")` are oneDNN's: 200 against 150
  GFLOP/s with AVX-512, no faster without (Trainer: 722 tokens/s without it, 729 with it).
* Attention takes blocks of 128 queries and the keys of their own document alone, in place of one
  mask of the row: 8 heads over rows of 512 in one document 1.5 times as fast, in documents of 100
  tokens 2.7 times; 3 heads alike. A step on full rows is 5 to 8 % faster, on short ones more. Of
  bf16 the scores are fp32, and the gradients of keys and values nearer to exact ones than those of
  torch's kernel.
* Backward does not make the probabilities of the first 512 keys' queries again, and rows that
  documents divide alike go together: forward and backward of 4 rows of 512 with 8 heads take 24 ms
  instead of 42 in bf16, 37 instead of 46 in fp32. What is kept is a fifth of a step's memory
  (`memory`: 0.79 instead of 0.64), and grows with the length, not with its square.
* What a step frees, glibc keeps for the next one instead of giving it back and fetching 50,000
  pages anew: 3 % of the time in bf16 and in fp32, 4 % compiled.
* RMSNorm is few passes over memory on a CPU, where torch's is a dozen: an uncompiled step in fp32,
  of the 26.9M model and of the tiny one, is 3 to 4 % faster and takes 15 % less memory; one in
  bf16, where queries and keys are normed and turned in fp32 now, as on a card, 0 to 2 %.
* The rotation by four operators on halves of a head instead of seven, the feed-forward layer's
  second half with a backward of its own that overwrites what it no longer needs, and in fp32 scores
  made where they are kept: of an uncompiled step of the 26.9M model together 1.6 % in fp32, and
  2.5 % in bf16, in turn within one process.
* A long run on a CPU is compiled where it is in bf16: steps of the 26.9M model 1.1 times as fast,
  for half a minute of compiling. In fp32, where products take most of a step, nothing was won.
* Muon's Newton-Schulz runs in fp32 where bf16 is slow (a matrix of 512 x 512: 0.03 s instead of
  2.2 s), and takes all matrices of one shape at once. It is paid once a step, so that it weighs
  more the fewer tokens a step has.
* Where the limit is, with AVX-512: of a step of 4,096 tokens in fp32, uncompiled, 3.4 s of 4.5 are
  products at the speed of the best one (mfu_fp32), and Trainer's step has the same ones. In bf16,
  compiled, they take 1.7 s of 2.4, attention 0.4, of which 0.3 are products too, the loss 0.08.
  With the same share of products `packed` is what they cost in fp32 over bf16: 2.05.
* `mfu` divides a minute of steps by the best product of a quarter of a second, and the host is
  shared: in one run micro-batches of one size took 1.11 to 1.41 s, 1.26 in the median.
* What is won beside precision is won by packing (`padded`), by computing logits only where a label
  is (`sft`), and by learning more from each token (`time_to_loss`). Of `sft` most is the mask of
  4,096 x 4,096 that the peer's default brings; `sft_wrapped` is without it.
* In the race of 20 minutes Trainer's AdamW ended at 2.516 bits per byte with a rate of 3e-3, at
  2.514 with 6e-3 and at 2.576 with 12e-3, during whose run other programs took some of the cores.
* A pair by itself says little on a host that others share: of `packed` Trainer's runs made 576 to
  840 tokens/s within two days. The ratios of one day, 2026-11-26, at three commits: 1.86, 2.07,
  2.09, 2.22 and 2.45, of which the table has the last two.
* The loss turns its probabilities into the gradient in place; the feed-forward layer saves its two
  inputs alone and recomputes silu and product in backward. Both take less memory, and the step of
  the 2.8M model was 5 to 8 % faster. Records up to 2026-11-26 are of a loss that also overwrote the
  logits, which saved 4 bytes for each of them in fp32.
* The output matrix is asked only where a label is: of a conversation a third has none.
* Left out: micro-batches of 2, 8 or 16 rows of 512 in place of 4: no faster (16: 10 % slower).
* Left out: one cast for q, k and v: 1 %. Huge pages, silu and its product or the loss in pieces
  that a cache holds: nothing."""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("page", nargs="?", type=Path, default=ROOT / "docs/benchmarks.md")
    options = parser.parse_args()
    records = [json.loads(line) for line in RECORDS.open(encoding="utf-8")]
    options.page.write_text(page(records, up_to_date()), encoding="utf-8")
    print(f"wrote {options.page}")


def by_machine(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The last record of each figure by machine and by the figure's name, the last machine last."""
    machines: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        name = f"{record['cpu']}, {record['threads']} threads, torch {record['torch']}"
        machines[name] = machines.pop(name, {})
        machines[name][full_name(record)] = record
    return machines


def full_name(record: dict[str, Any]) -> str:
    """A figure with what it was measured on, where that can be chosen."""
    if "minutes" in record:
        words = " ".join([Path(record["config"]).stem, *record["set"]])
        return f"{record['figure']}, {words}, {record['minutes']:g} min"
    return record["figure"]


def page(records: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    """The page's text, from the records of figures and the runs of ablations."""
    machines = by_machine(records)
    lines, order = [INTRODUCTION], list(WHAT)
    for machine, figures in reversed(machines.items()):
        lines += ["", f"## {machine}", "", "| figure | measured | wanted | what | when |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for record in sorted(figures.values(), key=lambda record: order.index(record["figure"])):
            when, what = f"{record['date']}, {record['commit']}", WHAT[record["figure"]]
            name = full_name(record)
            lines.append(f"| {name} | {told(record)} | {record['aim']} | {what} | {when} |")
    lines += ["", NOTES]
    for stage in CHANGES:
        for tokens in sorted({run["tokens"] for run in runs if run["stage"] == stage}):
            own = [run for run in runs if (run["stage"], run["tokens"]) == (stage, tokens)]
            lines += ablations(stage, tokens, own)
    return "\n".join(lines) + "\n"


def told(record: dict[str, Any]) -> str:
    """Median and range."""
    values = sorted(record["values"])
    if not values:
        return "not reached"
    middle = f"{record['median']:.3g}"
    return middle if len(values) == 1 else f"{middle} ({values[0]:.3g} to {values[-1]:.3g})"


def ablations(stage: str, tokens: int, runs: list[dict[str, Any]]) -> list[str]:
    """Settings from best to worst by their gain, the mean over the centre's seeds that they have.

    Means alone would put first what has run with the easier seeds only.
    """
    by_change: dict[str, dict[int, float]] = {}  # change -> seed -> value
    for run in runs:
        by_change.setdefault(run["change"], {})[run["seed"]] = run["value"]
    recipes = {run["change"] for run in runs if run["default"]}
    centre = by_change.get("", {})
    gains = {
        change: statistics.mean(centre[seed] - values[seed] for seed in centre.keys() & values)
        for change, values in by_change.items()
        if centre.keys() & values
    }
    lines = [
        "",
        f"## Ablations of configs/tiny_{stage}.yaml, {tokens:,} tokens",
        "",
        f"{FIGURE[stage]} at the end, lower is better; the centre is the recipe"
        f"{f' with {CENTRE[stage]}' if CENTRE[stage] else ''}.",
        "",
        "| setting | less than the centre, seed by seed | mean | spread | seeds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for change in sorted(gains, key=gains.__getitem__, reverse=True):
        values = by_change[change].values()
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
        name, gain = (f"`{change}`", f"{gains[change]:+.4f}") if change else ("the centre", "")
        if change in recipes:
            name += " **(the recipe)**"
        lines.append(
            f"| {name} | {gain} | {statistics.mean(values):.4f} | {spread} | {len(values)} |"
        )
    return lines


if __name__ == "__main__":
    main()
