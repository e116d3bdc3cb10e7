"""Plot of a demo's learning curves: bits per byte over minutes of training, with baselines.

    python -m bench.plot_demo [runs/demo] [docs/demo.svg]

Reads metrics.jsonl and baselines.json of each stage. Pretraining and fine-tuning are shown one
after the other in one plot: thin lines are training batches, markers are validation text. The two
stages read different text, so each has its own baselines (none if baselines.json is missing). A
second plot shows the accuracy of preference optimization on held-out pairs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.past_runs import minutes_trained
from trainlib.core.terminal import use_replacement_characters
from trainlib.engine.metrics import (
    VAL_BITS_PER_BYTE,
    VAL_REWARD_ACCURACY,
    read_metrics,
)

TITLES = {"pretrain": "pretraining", "sft": "fine-tuning", "dpo": "preference optimization"}
COLORS = {"pretrain": "#1f5fa8", "sft": "#b3541e", "dpo": "#3d7a3d"}
TRAIN_BITS_PER_BYTE = "train/bits_per_byte"
TRAIN_REWARD_ACCURACY = "train/reward_accuracy"


class Curve(NamedTuple):
    """A stage's points as (minutes since the start of the demo, value), in step order."""

    stage: str
    train: list[tuple[float, float]]
    val: list[tuple[float, float]]
    begin: float
    end: float
    baselines: dict[str, float]


def read_curves(demo: Path) -> list[Curve]:
    """Return the curves of the existing stages; each starts where the previous one ended."""
    curves, begin = [], 0.0
    for stage in TITLES:
        if not (demo / stage / "metrics.jsonl").is_file():
            continue
        rows = read_metrics(demo / stage)
        minutes = [begin + each for each in minutes_trained(rows)]
        train, val = (
            (TRAIN_REWARD_ACCURACY, VAL_REWARD_ACCURACY)
            if stage == "dpo"
            else (TRAIN_BITS_PER_BYTE, VAL_BITS_PER_BYTE)
        )
        end = minutes[-1] if minutes else begin
        curves.append(
            Curve(stage, points(rows, minutes, train), points(rows, minutes, val), begin, end,
                  read_baselines(demo / stage))
        )  # fmt: skip
        begin = end
    return curves


def points(
    rows: list[dict[str, float]], minutes: list[float], name: str
) -> list[tuple[float, float]]:
    """Return (minute, value) for the rows that have this metric."""
    return [(m, row[name]) for m, row in zip(minutes, rows, strict=True) if name in row]


def read_baselines(folder: Path) -> dict[str, float]:
    """Return the content of a run's baselines.json, or {} if the file is missing."""
    path = folder / "baselines.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Return label heights close to the descending values, at least `gap` apart."""
    heights: list[float] = []
    for value in values:
        heights.append(min(value, heights[-1] - gap) if heights else value)
    return heights


def draw(curves: list[Curve], picture: Path) -> None:
    """Draw the plot and save it in the format given by the file extension."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Text instead of paths, and fixed ids, keep the file small and its diffs readable.
    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "demo", "font.size": 10}
    text = [curve for curve in curves if curve.stage != "dpo"]
    pairs = [curve for curve in curves if curve.stage == "dpo"]
    figure, axes = pyplot.subplots(
        1, 1 + len(pairs), figsize=(9.6, 4.2), squeeze=False, layout="constrained",
        width_ratios=[3.6, 1][: 1 + len(pairs)],
    )  # fmt: skip
    draw_bits(axes[0][0], text)
    if pairs:
        draw_pairs(axes[0][1], pairs[0])
    picture.parent.mkdir(parents=True, exist_ok=True)
    svg = picture.suffix == ".svg"
    figure.savefig(picture, dpi=150, metadata={"Date": None} if svg else None)
    pyplot.close(figure)


def draw_bits(axes: Any, curves: list[Curve]) -> None:
    """Draw the bits per byte of pretraining and fine-tuning."""
    length = max(curve.end for curve in curves)
    for curve in curves:
        draw_curve(axes, curve)
        named = sorted(curve.baselines.items(), key=lambda item: -item[1])
        for (name, value), height in zip(named, spread([v for _, v in named], 0.15), strict=True):
            draw_baseline(axes, curve, f"{name} {value:.2f}", value, height)
    for curve in curves[1:]:
        axes.axvline(curve.begin, color="#bbbbbb", linewidth=0.8)
    axes.set(xlabel="minutes of training", ylabel="bits per byte, lower is better",
             xlim=(0, length * 1.02))  # fmt: skip
    axes.plot([], [], color="#444444", linewidth=0.9, label="training batch")
    axes.plot([], [], color="#444444", marker="o", linestyle="none", label="held-out text")
    axes.plot([], [], color="#777777", linestyle=":", label="baseline")
    axes.legend(loc="lower left", frameon=False, fontsize=8)


def draw_pairs(axes: Any, curve: Curve) -> None:
    """Draw the share of pairs in which the model prefers the chosen answer."""
    draw_curve(axes, curve)
    draw_baseline(axes, curve, "chance", 0.5, 0.5)
    axes.set(xlabel="minutes of training", ylabel="accuracy on pairs", ylim=(0, 1))


def draw_baseline(axes: Any, curve: Curve, text: str, value: float, height: float) -> None:
    """Draw a horizontal line spanning a stage, with its label at `height`."""
    length = curve.end - curve.begin
    axes.hlines(value, curve.begin, curve.end, color="#777777", linewidth=0.9, linestyle=":")
    axes.annotate(text, (curve.end - 0.12 * length, height), (0, 2), textcoords="offset points",
                  ha="right", va="bottom", fontsize=8, color="#555555",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4})  # fmt: skip


def draw_curve(axes: Any, curve: Curve) -> None:
    """Draw training as a thin line and validation as markers; label the first and last marker."""
    color = COLORS[curve.stage]
    if curve.train:
        axes.plot(*zip(*curve.train, strict=True), color=color, linewidth=0.9, alpha=0.6)
    if curve.val:
        axes.plot(*zip(*curve.val, strict=True), color=color, marker="o", markersize=5,
                  linestyle="none", clip_on=False, zorder=3)  # fmt: skip
    for (minute, value), last in ((curve.val[0], False), (curve.val[-1], True)) * bool(curve.val):
        axes.annotate(f"{value:.2f}", (minute, value), (-5, -14) if last else (5, 4),
                      textcoords="offset points", ha="right" if last else "left",
                      fontsize=9, color=color, weight="bold")  # fmt: skip
    axes.text((curve.begin + curve.end) / 2, 1.02, TITLES[curve.stage], ha="center", color=color,
              weight="bold", transform=axes.get_xaxis_transform())  # fmt: skip
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    """Draw the plot of a demo."""
    use_replacement_characters()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m bench.plot_demo", None, __doc__, formatter_class=formatter
    )
    parser.add_argument("demo", type=Path, nargs="?", default=Path("runs/demo"))
    parser.add_argument("picture", type=Path, nargs="?", default=Path("docs/demo.svg"))
    options = parser.parse_args()
    curves = read_curves(options.demo)
    if not any(curve.train or curve.val for curve in curves if curve.stage != "dpo"):
        sys.exit(f"error: {options.demo} has no pretrain/metrics.jsonl. Run `make demo`.")
    draw(curves, options.picture)
    print(options.picture)


if __name__ == "__main__":
    main()
