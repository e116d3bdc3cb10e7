"""Picture of a run's validation curve, as a PNG, which every hub and Markdown viewer shows."""

from __future__ import annotations

import io

from PIL import Image, ImageDraw, ImageFont

SIZE, LEFT, RIGHT, TOP, BOTTOM = (2400, 1200), 200, 1960, 150, 1060
"""Pixels of the picture and its axes. It is drawn at twice its final size, for smooth lines."""
BLUE, GRAY, BLACK = "#1f5fa8", "#777777", "#222222"
Points = list[tuple[float, float]]


def draw_curve(name: str, val: Points, baselines: dict[str, float]) -> bytes:
    """Return a PNG: validation over steps as dots, and labelled baselines."""
    values = [*(y for _, y in val), *baselines.values()]
    low, high, last = min(values), max(values), max(1.0, val[-1][0])
    image = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(image)

    def at(x: float, y: float) -> tuple[float, float]:
        height = (y - low) / (high - low or 1)
        return LEFT + (RIGHT - LEFT) * x / last, BOTTOM - (BOTTOM - TOP) * height

    def write(x: float, y: float, text: str, anchor: str, color: str = BLACK) -> None:
        pen.text((x, y), text, color, ImageFont.load_default(44), anchor)

    first, end = (f"{y:.2f} at step {x:.0f}" for x, y in (val[0], val[-1]))
    title = f"Held-out {name}: {first}, {end}"
    write(SIZE[0] / 2, 60, title, "mm")
    write((LEFT + RIGHT) / 2, SIZE[1] - 30, "step", "mm")
    for i in range(5):
        step, value = last * i / 4, low + (high - low) * i / 4
        write(at(step, low)[0], BOTTOM + 24, f"{step:.0f}", "ma", GRAY)
        write(LEFT - 24, at(0, value)[1], f"{value:.2f}", "rm", GRAY)
    pen.line([(LEFT, TOP), (LEFT, BOTTOM), (RIGHT, BOTTOM)], GRAY, 3)
    for y in baselines.values():
        for x in range(LEFT, RIGHT, 36):  # Dashes.
            pen.line([(x, at(0, y)[1]), (x + 18, at(0, y)[1])], GRAY, 3)
    pen.line([at(*point) for point in val], BLUE, 8, "curve")
    for x, y in (at(*point) for point in val):
        pen.ellipse((x - 12, y - 12, x + 12, y + 12), BLUE)
    labels = [(y, f"{name} {y:.2f}", GRAY) for name, y in baselines.items()]
    labels.append((val[-1][1], f"validation {val[-1][1]:.2f}", BLUE))
    height = 0.0
    for y, text, color in sorted(labels, reverse=True):
        height = max(at(0, y)[1], height + 50)  # Labels do not overlap.
        write(RIGHT + 24, height, text, "lm", color)
    file = io.BytesIO()
    image.reduce(2).save(file, "PNG", optimize=True)
    return file.getvalue()
