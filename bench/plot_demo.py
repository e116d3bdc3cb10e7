"""Plot of a demo: bits per byte with baselines, and exact match, over minutes of training.

    python -m bench.plot_demo [runs/demo] [docs/demo.svg]

Reads metrics.jsonl, baselines.json and skills.json of each stage. The left plot has the bits per
byte of pretraining and fine-tuning on validation text. The two stages read different text, so each
has its own baselines (none if baselines.json is missing). The right plot has the share of correct
answers to held-out questions by kind, and the share of held-out pairs that preference optimization
gets right. The title states the result.
"""

from __future__ import annotations

import trainlib.core.threads  # noqa: F401  # Before torch.

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

TITLES = {"pretrain": "pretraining", "sft": "fine-tuning", "dpo": "DPO"}
COLORS = {"pretrain": "#1f5fa8", "sft": "#b3541e", "dpo": "#3d7a3d"}
SKILLS = {"sum": "#1f5fa8", "json": "#b3541e", "numeral_to_digits_zh": "#7a5ca8",
          "count_letter": "#8a7a1e", "three_digit_sum": "#777777"}  # fmt: skip
"""Kinds of questions in the plot, which has no room for all."""
WELL = 0.9
"""Share of correct answers that counts as a skill in the title."""
Points = list[tuple[float, float]]


class Curve(NamedTuple):
    """A stage's points as (minutes since the start of the demo, value), in step order."""

    stage: str
    begin: float
    end: float
    bits_per_byte: Points
    reward_accuracy: Points
    skills: dict[str, Points]
    baselines: dict[str, float]
    tested: dict[str, float]
    """The final test of all kinds: the share of correct answers."""


def read_curves(demo: Path) -> list[Curve]:
    """Return the curves of the existing stages; each starts where the previous one ended."""
    curves, begin = [], 0.0
    for stage in TITLES:
        folder = demo / stage
        if not (folder / "metrics.jsonl").is_file():
            continue
        rows = read_metrics(folder)
        minutes = [begin + each for each in minutes_trained(rows)]
        end = minutes[-1] if minutes else begin
        skills = {kind: points(rows, minutes, f"val/skills/{kind}/exact_match") for kind in SKILLS}
        tested = {
            kind: count["correct"] / count["total"]
            for kind, count in read_json(folder / "skills.json").items()
        }
        curves.append(
            Curve(
                stage, begin, end, points(rows, minutes, VAL_BITS_PER_BYTE),
                points(rows, minutes, VAL_REWARD_ACCURACY), skills,
                read_json(folder / "baselines.json"), tested,
            )
        )  # fmt: skip
        begin = end
    return curves


def points(rows: list[dict[str, float]], minutes: list[float], name: str) -> Points:
    """Return (minute, value) for the rows that have this metric."""
    return [(m, row[name]) for m, row in zip(minutes, rows, strict=True) if name in row]


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, or {} if the file is missing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Return label heights close to the descending values, at least `gap` apart."""
    heights: list[float] = []
    for value in values:
        heights.append(min(value, heights[-1] - gap) if heights else value)
    return heights


def title(curves: list[Curve]) -> str:
    """Return the result in one line: what the first stage learned, and the skills of the last."""
    first, tested = curves[0], curves[-1].tested
    result = f"{curves[-1].end:.0f} minutes of training: "
    result += f"{first.bits_per_byte[-1][1]:.2f} bits per byte of held-out text"
    if "bigram" in first.baselines:
        result += f" (bigrams {first.baselines['bigram']:.2f})"
    kinds = {kind: share for kind, share in tested.items() if "/" not in kind}
    if kinds:
        well = sum(share >= WELL for share in kinds.values())
        result += f"\nkinds of new questions with at least {10 * WELL:.0f} of 10 right answers: "
        result += f"{well} of {len(kinds)}"
    return result


def draw(curves: list[Curve], picture: Path) -> None:
    """Draw the plot and save it in the format given by the file extension."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Text instead of paths, and fixed ids, keep the file small and its diffs readable.
    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "demo", "font.size": 10}
    answered = [curve for curve in curves if curve.stage != "pretrain"]
    figure, axes = pyplot.subplots(
        1, 1 + bool(answered), figsize=(9.6, 4.6), squeeze=False, layout="constrained"
    )
    figure.suptitle(title(curves), fontsize=11)
    draw_bits(axes[0][0], [curve for curve in curves if curve.stage != "dpo"])
    if answered:
        draw_shares(axes[0][1], answered)
    picture.parent.mkdir(parents=True, exist_ok=True)
    svg = picture.suffix == ".svg"
    figure.savefig(picture, dpi=150, metadata={"Date": None} if svg else None)
    pyplot.close(figure)


def draw_bits(axes: Any, curves: list[Curve]) -> None:
    """Draw the bits per byte of pretraining and fine-tuning, with their baselines."""
    name_stages(axes, curves)
    for curve in curves:
        color = COLORS[curve.stage]
        plot(axes, curve.bits_per_byte, color)
        for (minute, value), last in zip(curve.bits_per_byte[:1] + curve.bits_per_byte[-1:],
                                         (False, True), strict=False):  # fmt: skip
            axes.annotate(f"{value:.2f}", (minute, value), (-3, -14) if last else (6, 2),
                          textcoords="offset points", ha="right" if last else "left",
                          fontsize=9, color=color, weight="bold")  # fmt: skip
        named = sorted(curve.baselines.items(), key=lambda item: -item[1])
        heights = spread([value for _, value in named], 0.15)
        for (name, value), height in zip(named, heights, strict=True):
            axes.hlines(
                value, curve.begin, curve.end, color="#777777", linewidth=0.9, linestyle=":"
            )
            start = curve.begin + 0.25 * (curve.end - curve.begin)
            axes.annotate(f"{name} {value:.2f}", (start, height), (0, -3), fontsize=8, va="top",
                          textcoords="offset points", color="#555555")  # fmt: skip
    axes.set(ylabel="bits per byte of held-out text, lower is better")
    axes.margins(y=0.1)


def draw_shares(axes: Any, curves: list[Curve]) -> None:
    """Draw the share of correct answers by kind, and of correctly ordered pairs."""
    name_stages(axes, curves)
    labels = []
    for kind, color in SKILLS.items():
        shares = [point for curve in curves for point in curve.skills[kind]]
        plot(axes, shares, color)
        if shares:
            last = curves[-1].tested.get(kind, shares[-1][1])
            labels.append((last, kind.replace("_", " "), color))
    pairs = [point for curve in curves for point in curve.reward_accuracy]
    plot(axes, pairs, COLORS["dpo"], linestyle="--")
    labels += [(value, "pairs", COLORS["dpo"]) for _, value in pairs[-1:]]
    labels.sort(reverse=True)
    for (value, text, color), height in zip(
        labels, spread([value for value, *_ in labels], 0.06), strict=True
    ):
        axes.annotate(f"{value:.2f} {text}", (curves[-1].end, height), (5, 0), va="center",
                      textcoords="offset points", fontsize=8, color=color,
                      annotation_clip=False)  # fmt: skip
    axes.set(ylabel="share correct, held-out questions and pairs", ylim=(-0.02, 1.02))


def plot(axes: Any, found: Points, color: str, linestyle: str = "-") -> None:
    """Draw points and the lines between them."""
    if found:
        axes.plot(*zip(*found, strict=True), color=color, marker="o", markersize=3.5,
                  linewidth=1.2, linestyle=linestyle, clip_on=False, zorder=3)  # fmt: skip


def name_stages(axes: Any, curves: list[Curve]) -> None:
    """Write the name of each stage above its part of the plot."""
    for curve in curves:
        axes.text((curve.begin + curve.end) / 2, 1.02, TITLES[curve.stage], ha="center",
                  color=COLORS[curve.stage], weight="bold",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    for curve in curves[1:]:
        axes.axvline(curve.begin, color="#bbbbbb", linewidth=0.8)
    axes.set(xlabel="minutes of training", xlim=(curves[0].begin, curves[-1].end))
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
    if not curves or not curves[0].bits_per_byte:
        sys.exit(f"error: {options.demo} has no pretrain/metrics.jsonl. Run `make demo`.")
    draw(curves, options.picture)
    print(options.picture)


if __name__ == "__main__":
    main()
