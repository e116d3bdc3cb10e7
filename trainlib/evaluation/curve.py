"""Picture of a run's validation curve, as a PNG, which every hub and Markdown viewer shows."""

import io

from PIL import Image, ImageDraw, ImageFont

BLUE, GRAY, LIGHT, BLACK = "#1f5fa8", "#777777", "#dddddd", "#222222"


def draw_curve(name: str, val: list[tuple[float, float]], baselines: dict[str, float]) -> bytes:
    """Return a PNG: validation by step with a dot at each evaluation, and labelled baselines."""
    values = [*(y for _, y in val), *baselines.values()]
    low, high, end = min(values), max(values), max(1.0, val[-1][0])
    image = Image.new("RGB", (2400, 1200), "white")  # Twice its final size, for smooth lines.
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(44)

    def at(x: float, y: float) -> tuple[float, float]:
        return 180 + 1720 * x / end, 1060 - 880 * (y - low) / (high - low or 1)

    first, last = (f"{y:.2f} at step {x:.0f}" for x, y in (val[0], val[-1]))
    pen.text((180, 80), f"Held-out {name}: {first}, {last}", BLACK, font, "lm")
    for value in (low + (high - low) * i / 4 for i in range(5)):
        pen.line([at(0, value), at(end, value)], LIGHT, 3)
        pen.text((156, at(0, value)[1]), f"{value:.2f}", GRAY, font, "rm")
    for step, anchor in ((0, "lm"), (end, "rm")):
        pen.text((at(step, low)[0], 1130), f"step {step:.0f}", GRAY, font, anchor)
    lines = [(label, [(0.0, y), (end, y)], GRAY, 4) for label, y in baselines.items()]
    height = 0.0
    lines = sorted([*lines, ("validation", val, BLUE, 8)], key=lambda line: -line[1][-1][1])
    for label, points, color, width in lines:
        places = [at(*point) for point in points]
        pen.line(places, color, width, "curve")
        height = max(places[-1][1], height + 50)  # Labels do not overlap.
        pen.text((1930, height), f"{label} {points[-1][1]:.2f}", color, font, "lm")
    for x, y in (at(*point) for point in val):
        pen.ellipse((x - 12, y - 12, x + 12, y + 12), BLUE)
    file = io.BytesIO()
    image.reduce(2).save(file, "PNG", optimize=True)
    return file.getvalue()
