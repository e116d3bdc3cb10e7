"""docs/benchmarks.md from bench/records.jsonl: the last record of each figure, machine by machine,
the one that was measured last first.

    python -m bench.report [docs/benchmarks.md]

Below it the ablations of bench/ablations.jsonl. Draws, each of the machine it was measured on last,

    time_to_loss.svg   bits per byte over minutes of ours and of each of the peer's runs
    scaling.svg        speed and memory over the length of a row, the rows and the model
    data.svg           tokenizing and memory over the size of the data
"""

from __future__ import annotations

import argparse
import itertools
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
    "plan": "seconds of a step in a run over what --plan --gpu here said just before, 2.8M",
    "scaling_length": "tokens/s of a step over transformers', same setting, 2.8M, rows of 128 on",
    "scaling_batch": "the same, 1 to 32 rows of 256",
    "scaling_model": "the same, 2 rows of 512, models of 2.8M to 101M",
    "cache": "tokenizing a file, MB/s over what the tokenizers library alone does",
    "cache_memory": "most memory of all processes while tokenizing, mapped files aside, MB",
    "cache_start": "seconds from the cached file to the first batch",
    "cache_training": "memory of training on the whole file over that on its first 10 MB",
}
"""Every figure with a line in the table, in the order of the page."""


INTRODUCTION = """# Benchmarks

Written by `python -m bench.report` from the records that `make bench` and `make bench-long` append
to `bench/records.jsonl` and `bench/ablations.jsonl`. Given are the median of the repeats, the
smallest and the largest; of scaling, over the sizes. Ours and the peer's run in turn, and a ratio
is taken pair by pair. Peers: the versions of `bench/requirements-peers.txt`. No GPU has been
measured yet.

What a figure is made of stands in the first lines of its program: `bench/training.py`,
`bench/costs.py`, `bench/time_to_loss.py`, `bench/scaling.py`, `bench/token_cache.py`,
`bench/ablations.py`."""

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
* The loss overwrites the logits by the probabilities, and those by the gradient; the feed-forward
  layer keeps its two inputs alone and makes silu and product again in backward. Both take less
  memory, and the step of the 2.8M model was 5 to 8 % faster.
* The output matrix is asked only where a label is: of a conversation a third has none.
* Left out: micro-batches of 2, 8 or 16 rows of 512 in place of 4: no faster (16: 10 % slower).
* Left out: one cast for q, k and v: 1 %. Huge pages, silu and its product or the loss in pieces
  that a cache holds: nothing."""


def main() -> None:
    """Write the page and the pictures."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("page", nargs="?", type=Path, default=ROOT / "docs/benchmarks.md")
    options = parser.parse_args()
    records = [json.loads(line) for line in RECORDS.open(encoding="utf-8")]
    options.page.write_text(page(records, up_to_date()), encoding="utf-8")
    print(f"wrote {options.page}")
    machines = by_machine(records)
    for kind, machine in last_with_each(machines).items():
        draw, file, _ = PICTURES[kind]
        draw(of_kind(machines[machine], kind), options.page.with_name(file))


def of_kind(figures: dict[str, dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The records that a picture is drawn from: those whose figure begins with its name."""
    return [record for record in figures.values() if record["figure"].startswith(kind)]


def last_with_each(machines: dict[str, dict[str, dict[str, Any]]]) -> dict[str, str]:
    """For each picture the machine that was measured last, of those with figures for it."""
    return {
        kind: machine
        for machine, figures in machines.items()
        for kind in PICTURES
        if of_kind(figures, kind)
    }


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
    if "megabytes" in record:
        return f"{record['figure']}, {record['megabytes']:,} MB"
    if "minutes" in record:
        words = " ".join([Path(record["config"]).stem, *record["set"]])
        return f"{record['figure']}, {words}, {record['minutes']:g} min"
    return record["figure"]


def page(records: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    """The page's text, from the records of figures and the runs of ablations."""
    machines = by_machine(records)
    lines = [INTRODUCTION]
    for machine, figures in reversed(machines.items()):
        lines += ["", f"## {machine}", "", "| figure | measured | wanted | what | when |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        table = [r for r in figures.values() if r["figure"] != "profile"]
        for record in sorted(table, key=lambda record: list(WHAT).index(record["figure"])):
            when, what = f"{record['date']}, {record['commit']}", WHAT[record["figure"]]
            name = full_name(record)
            lines.append(f"| {name} | {told(record)} | {record['aim']} | {what} | {when} |")
        for kind, (_, file, caption) in PICTURES.items():
            if last_with_each(machines).get(kind) == machine:
                lines += ["", f"![{caption}]({file})"]
        if "profile" in figures:
            lines += profile(figures["profile"])
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


def profile(record: dict[str, Any]) -> list[str]:
    """Where a step's time goes."""
    of = f"8 rows of 512, 26.9M, {record.get('precision', 'fp32')}, uncompiled"
    lines = ["", "### Where the time of a step goes", "",
             f"{of}; of the update, made once in 131,072 tokens, its share of these 4,096: "
             f"{record['median']:.3g} s in all.", "",
             "| operator by itself | share | calls |", "| --- | --- | --- |"]  # fmt: skip
    for row in record["operators"]:
        lines.append(f"| {row['name']} | {row['share']:.1%} | {row['calls']} |")
    return lines


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


def new_figure(columns: int, size: tuple[float, float], rows: int = 1) -> tuple[Any, Any]:
    """A figure of matplotlib and its axes, drawn without a screen."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # Without it ids are drawn by chance.
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, squeeze=False)


def save(figure: Any, picture: Path) -> None:
    """Write it, the same bytes for the same figures."""
    figure.savefig(picture, bbox_inches="tight", metadata={"Date": None})
    print(f"wrote {picture}")


def draw_scaling(records: list[dict[str, Any]], picture: Path) -> None:
    """A column for each axis: tokens a second above, peak memory below."""
    figure, grid = new_figure(len(records), (4 * len(records), 6), rows=2)
    for column, record in enumerate(records):
        names = [point["x"] for point in record["points"]]
        for row, (key, unit, title) in enumerate(
            [("per_second", 1, "tokens/s"), ("peak", 1e9, "peak of a step, GB")]
        ):
            axes = grid[row][column]
            for side, label, style, color in (
                ("ours", "ours", "-o", "#1f5fa8"),
                ("theirs", "transformers", "--s", "#666666"),
            ):
                values = [point[side][key] / unit for point in record["points"]]
                axes.plot(names, values, style, color=color, label=label)
            axes.set(xlabel=record["figure"].removeprefix("scaling_"), ylabel=title)
            axes.margins(y=0.1)
            axes.set_ylim(bottom=0)
    grid[0][0].legend()
    figure.suptitle(f"{records[0]['cpu']}, {records[0]['threads']} threads")
    figure.tight_layout()
    save(figure, picture)


def draw_data(records: list[dict[str, Any]], picture: Path) -> None:
    """Speed of tokenizing on the left, memory on the right, each over the size of the file."""
    parts: dict[int, dict[str, Any]] = {}
    for record in records:  # The later ones measured the later parts anew.
        parts.setdefault(record["megabytes"], {}).update(record["parts"])
    figure, grid = new_figure(2, (11, 4))
    for axes, key, title, names in (
        (grid[0][0], "MB_per_s", "text tokenized, MB/s",
         {"cache": "ours, from the file to the cache", "library": "tokenizers alone, in memory"}),
        (grid[0][1], "peak_MB", "peak of all processes, MB",
         {"cache": "tokenizing", "start": "to the first batch", "train": "training, 2.8M"}),
    ):  # fmt: skip
        for (part, label), style in zip(names.items(), ("-o", "--s", ":^"), strict=False):
            sizes = [size for size in sorted(parts) if part in parts[size]]
            values = [parts[size][part][key] for size in sizes]
            axes.plot(sizes, values, style, label=label)
        axes.set(xlabel="size of the file, MB", ylabel=title)
        axes.margins(y=0.15)
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.suptitle(f"{records[0]['cpu']}, {records[0]['threads']} threads")
    save(figure, picture)


def draw_races(records: list[dict[str, Any]], picture: Path) -> None:
    """For each race a panel: the curves of the peer's runs and of ours."""
    figure, grid = new_figure(len(records), (7 * len(records), 4))
    for axes, record in zip(grid[0], records, strict=True):
        for row, style in zip(record["theirs"], itertools.cycle(("--", "-.", ":"))):  # noqa: B905
            label = f"transformers.Trainer, AdamW {row['rate']}"
            axes.plot(*zip(*row["curve"], strict=True), style, color="#666666", label=label)
        for row, style in zip(record["ours"], ("-", "--"), strict=False):
            label = f"ours, a run of {row['minutes']:.1f} min"
            axes.plot(*zip(*row["curve"], strict=True), style, color="#1f5fa8", label=label)
        axes.set(
            xlabel="minutes of training",
            ylabel="bits per byte of held-out text",
            title=f"{record['config']} on {record['cpu']}, {record['threads']} threads",
        )
        axes.legend()
    save(figure, picture)


PICTURES = {
    "time_to_loss": (draw_races, "time_to_loss.svg", "bits per byte over minutes of training"),
    "scaling": (draw_scaling, "scaling.svg", "speed and memory by length, batch and model"),
    "cache": (draw_data, "data.svg", "tokenizing and memory by the size of the data"),
}
"""By what the names of its figures begin with: what draws a picture, its file and caption."""


if __name__ == "__main__":
    main()
