"""docs/benchmarks.md from bench/records.jsonl: the last record of each figure, machine by machine.

    python -m bench.report [docs/benchmarks.md]

Also draws docs/time_to_loss.svg: bits per byte over minutes of ours and of each of the peer's runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.common import RECORDS, ROOT

WHAT = {
    "packed": "real tokens/s on full rows of 512, 26.9M, as shipped, over transformers.Trainer",
    "same": "the same, AdamW, same dtype and matmul setting on both sides, uncompiled",
    "padded": "real tokens/s on rows of 60 to 700 characters, over Trainer's dynamic padding",
    "padded_same": "the same, same setting on both sides",
    "sft": "real tokens/s of fine-tuning, over trl.SFTTrainer with packing",
    "dpo": "pairs/s of preference optimisation with its reference, over trl.DPOTrainer",
    "mfu": "model FLOP utilisation: share of the best matrix product measured in the same run",
    "time_to_loss": "how many times sooner the loss of Trainer's best AdamW run is reached, 2.8M",
    "checkpoint": "share of training time that saving every 200th step takes, 26.9M",
    "start": "seconds from the command to the first step, data cached, not compiled",
    "memory": "peak bytes of a step of 8 rows of 512 over transformers' step, fp32",
    "cache": "tokenizing a file, MB/s over what the tokenizers library alone does",
    "cache_memory": "most memory of all processes while a file is tokenized, MB",
    "cache_start": "seconds from the cached file to the first batch",
    "cache_training": "memory of training on the whole file over that on its first 10 MB",
}
"""Every figure that a record may hold, in the order of the page."""


INTRODUCTION = """# Benchmarks

Written by `python -m bench.report` from `bench/records.jsonl`, to which `make bench` appends. Given
are the median of the repeats, the smallest and the largest. Ours and the peer's run in turn, and a
ratio is taken pair by pair. Peers: the versions of `bench/requirements-peers.txt`. No GPU has been
measured yet.

What a figure is made of stands in the first lines of its program: `bench/training.py`,
`bench/costs.py`, `bench/time_to_loss.py`, `bench/token_cache.py`."""


def main() -> None:
    """Write the page and the picture."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("page", nargs="?", type=Path, default=ROOT / "docs/benchmarks.md")
    options = parser.parse_args()
    records = [json.loads(line) for line in RECORDS.open(encoding="utf-8")]
    options.page.write_text(page(records), encoding="utf-8")
    print(f"wrote {options.page}")
    races = [record for record in records if record["figure"] == "time_to_loss"]
    if races:
        picture = options.page.with_name("time_to_loss.svg")
        draw(races[-1], picture)
        print(f"wrote {picture}")


def page(records: list[dict[str, Any]]) -> str:
    """The page's text."""
    machines: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        name = f"{record['cpu']}, {record['threads']} threads, torch {record['torch']}"
        machines.setdefault(name, {})[record["figure"]] = record
    lines = [INTRODUCTION]
    for machine, figures in machines.items():
        lines += ["", f"## {machine}", "", "| figure | measured | wanted | what | when |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for name in sorted(figures, key=list(WHAT).index):
            record = figures[name]
            when = f"{record['date']}, {record['commit']}"
            lines.append(f"| {name} | {told(record)} | {record['aim']} | {WHAT[name]} | {when} |")
        if "time_to_loss" in figures:
            lines += ["", "![bits per byte over minutes of training](time_to_loss.svg)"]
    return "\n".join(lines) + "\n"


def told(record: dict[str, Any]) -> str:
    """Median and range."""
    values = sorted(record["values"])
    if not values:
        return "not reached"
    middle = f"{record['median']:.3g}"
    return middle if len(values) == 1 else f"{middle} ({values[0]:.3g} to {values[-1]:.3g})"


def draw(record: dict[str, Any], picture: Path) -> None:
    """Curves of the peer's runs and of ours."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for row, style in zip(record["theirs"], ("--", "-.", ":"), strict=False):
        label = f"transformers.Trainer, AdamW {row['rate']}"
        axes.plot(*zip(*row["curve"], strict=True), style, color="#666666", label=label)
    for row in record["ours"]:
        label = f"ours, a run of {row['minutes']:.1f} min"
        axes.plot(*zip(*row["curve"], strict=True), color="#1f5fa8", label=label)
    axes.set(
        xlabel="minutes of training",
        ylabel="bits per byte of held-out text",
        title=f"{record['config']} on {record['cpu']}, {record['threads']} threads",
    )
    axes.legend()
    figure.savefig(picture, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
