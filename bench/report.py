"""docs/benchmarks.md from bench/records.jsonl: the last record of each figure, machine by machine.

    python -m bench.report [docs/benchmarks.md]

Below it the ablations of bench/ablations.jsonl. Also draws, beside the page,

    time_to_loss.svg   bits per byte over minutes of ours and of each of the peer's runs
    scaling.svg        speed and memory over the length of a row, the rows and the model
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from bench.ablations import CHANGES, FIGURE, rows
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
    "plan": "seconds of a step in a run over what --plan --gpu here said just before, 2.8M",
    "scaling_length": "tokens/s of a step over transformers', same setting, 2.8M, rows of 128 on",
    "scaling_batch": "the same, 1 to 32 rows of 256",
    "scaling_model": "the same, 2 rows of 512, models of 2.8M to 101M",
    "cache": "tokenizing a file, MB/s over what the tokenizers library alone does",
    "cache_memory": "most memory of all processes while a file is tokenized, MB",
    "cache_start": "seconds from the cached file to the first batch",
    "cache_training": "memory of training on the whole file over that on its first 10 MB",
}
"""Every figure with a line in the table, in the order of the page."""


INTRODUCTION = """# Benchmarks

Written by `python -m bench.report` from `bench/records.jsonl`, to which `make bench` appends. Given
are the median of the repeats, the smallest and the largest. Ours and the peer's run in turn, and a
ratio is taken pair by pair. Peers: the versions of `bench/requirements-peers.txt`. No GPU has been
measured yet.

What a figure is made of stands in the first lines of its program: `bench/training.py`,
`bench/costs.py`, `bench/time_to_loss.py`, `bench/scaling.py`, `bench/token_cache.py`,
`bench/ablations.py`."""


def main() -> None:
    """Write the page and the picture."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("page", nargs="?", type=Path, default=ROOT / "docs/benchmarks.md")
    options = parser.parse_args()
    records = [json.loads(line) for line in RECORDS.open(encoding="utf-8")]
    options.page.write_text(page(records, rows()), encoding="utf-8")
    print(f"wrote {options.page}")
    last = {record["figure"]: record for record in records}
    scaling = {name: record for name, record in last.items() if name.startswith("scaling_")}
    if "time_to_loss" in last:
        draw_race(last["time_to_loss"], options.page.with_name("time_to_loss.svg"))
    if scaling:
        draw_scaling(scaling, options.page.with_name("scaling.svg"))


def page(records: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    """The page's text, from the records of figures and the runs of ablations."""
    machines: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        name = f"{record['cpu']}, {record['threads']} threads, torch {record['torch']}"
        machines.setdefault(name, {})[record["figure"]] = record
    lines = [INTRODUCTION]
    for machine, figures in machines.items():
        lines += ["", f"## {machine}", "", "| figure | measured | wanted | what | when |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for name in sorted(figures.keys() & WHAT.keys(), key=list(WHAT).index):
            record = figures[name]
            when = f"{record['date']}, {record['commit']}"
            lines.append(f"| {name} | {told(record)} | {record['aim']} | {WHAT[name]} | {when} |")
        if "time_to_loss" in figures:
            lines += ["", "![bits per byte over minutes of training](time_to_loss.svg)"]
        if any(name.startswith("scaling_") for name in figures):
            lines += ["", "![speed and memory by length, batch and model](scaling.svg)"]
        if "profile" in figures:
            lines += profile(figures["profile"])
    for stage in CHANGES:
        lines += ablations([run for run in runs if run["stage"] == stage])
    return "\n".join(lines) + "\n"


def told(record: dict[str, Any]) -> str:
    """Median and range."""
    values = sorted(record["values"])
    if not values:
        return "not reached"
    middle = f"{record['median']:.3g}"
    return middle if len(values) == 1 else f"{middle} ({values[0]:.3g} to {values[-1]:.3g})"


def profile(record: dict[str, Any]) -> list[str]:
    """Where a step's time goes."""
    lines = ["", f"### A step of 8 rows of 512, 26.9M, fp32: {record['median']:.3g} s", "",
             "| operator by itself | share | calls |", "| --- | --- | --- |"]  # fmt: skip
    for row in record["operators"]:
        lines.append(f"| {row['name']} | {row['share']:.1%} | {row['calls']} |")
    return lines


def ablations(runs: list[dict[str, Any]]) -> list[str]:
    """Settings of one stage from best to worst: mean, spread and difference to the default."""
    if not runs:
        return []
    by_change: dict[str, dict[int, float]] = {}  # change -> seed -> value
    for run in runs:
        by_change.setdefault(run["change"], {})[run["seed"]] = run["value"]
    means = {change: statistics.mean(values.values()) for change, values in by_change.items()}
    default = by_change.get("", {})
    stage, tokens = runs[0]["stage"], runs[0]["tokens"]
    lines = [
        "",
        f"## Ablations of configs/tiny_{stage}.yaml, {tokens:,} tokens",
        "",
        f"{FIGURE[stage]} at the end, lower is better; differences are taken seed by seed.",
        "",
        "| setting | mean | spread | less than the default | seeds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for change in sorted(means, key=means.__getitem__):
        values = by_change[change]
        spread = f"{statistics.stdev(values.values()):.4f}" if len(values) > 1 else ""
        gains = [default[seed] - value for seed, value in values.items() if seed in default]
        gain = f"{statistics.mean(gains):+.4f}" if gains and change else ""
        name = f"`{change}`" if change else "**the default**"
        lines.append(f"| {name} | {means[change]:.4f} | {spread} | {gain} | {len(values)} |")
    return lines


def new_figure(columns: int, size: tuple[float, float], rows: int = 1) -> tuple[Any, Any]:
    """A figure of matplotlib and its axes, drawn without a screen."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, squeeze=False)


def save(figure: Any, picture: Path) -> None:
    """Write it, the same bytes for the same figures."""
    figure.savefig(picture, bbox_inches="tight", metadata={"Date": None})
    print(f"wrote {picture}")


def draw_scaling(records: dict[str, dict[str, Any]], picture: Path) -> None:
    """A column for each axis: tokens a second above, peak memory below."""
    figure, grid = new_figure(len(records), (4 * len(records), 6), rows=2)
    for column, (name, record) in enumerate(sorted(records.items())):
        points = record["points"]
        names = [point["x"] for point in points]
        for row, (key, unit, title) in enumerate(
            [("per_second", 1, "tokens/s"), ("peak", 1e9, "peak of a step, GB")]
        ):
            axes = grid[row][column]
            for side, style in (("ours", "-o"), ("theirs", "--s")):
                label = {"ours": "ours", "theirs": "transformers"}[side]
                color = {"ours": "#1f5fa8", "theirs": "#666666"}[side]
                values = [point[side][key] / unit for point in points]
                axes.plot(names, values, style, color=color, label=label)
            axes.set(xlabel=name.removeprefix("scaling_"), ylabel=title)
            axes.set_ylim(bottom=0)
    grid[0][0].legend()
    machine = next(iter(records.values()))
    figure.suptitle(f"{machine['cpu']}, {machine['threads']} threads")
    figure.tight_layout()
    save(figure, picture)


def draw_race(record: dict[str, Any], picture: Path) -> None:
    """Curves of the peer's runs and of ours."""
    figure, grid = new_figure(1, (7, 4))
    axes = grid[0][0]
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
    save(figure, picture)


if __name__ == "__main__":
    main()
