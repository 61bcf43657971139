"""Training curves of a run, from its `metrics.jsonl` to an inline SVG."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Curve:
    """How an entry of `metrics.jsonl` is drawn: a noisy one is smoothed, its raw values pale behind it."""

    title: str
    noisy: bool = True
    log_scale: bool = False


CURVES = {
    "loss": Curve("loss", log_scale=True),
    "learning_rate": Curve("learning rate", noisy=False),
    "tokens_per_second": Curve("tokens/s"),
    "grad_norm": Curve("gradient norm"),
}
MAX_POINTS = 1_000
SMOOTHING = 0.05  # of the points, on each side
LOG_SCALE_FROM = 10.0  # ratio of the largest to the smallest value
# matplotlib knows no `currentColor`; this colour stands for it until the figure is drawn, so that text
# follows the theme.
INK, ACCENT = "#010203", "#3b82f6"


def read_metrics(path: Path) -> list[dict]:
    """Rows of a `metrics.jsonl`, one per step; what a resumed run writes again replaces the older row.

    A last line without its newline was cut off by a kill, and is left out.

    Raises:
        ValueError: some other line is not an object with a step.
    """
    rows: dict[int, dict] = {}
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows[row["step"]] = {**rows.get(row["step"], {}), **row}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with a step, found {line[:80]!r}"
            ) from error
    return [rows[step] for step in sorted(rows)]


def draw_curves(rows: Sequence[Mapping[str, float]]) -> str:
    """SVG markup with one panel for each entry of `CURVES` that the rows hold; empty if they hold none."""
    panels = {key: points for key in CURVES if len(points := _points(rows, key)) > 1}
    if not panels:
        return ""
    style = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.6 * len(panels), 2.5), layout="constrained")
        for axes, (key, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            _draw(axes, CURVES[key], points)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def _points(rows: Sequence[Mapping[str, float]], key: str) -> list[tuple[int, float]]:
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    stride = -(-len(points) // MAX_POINTS)
    if stride <= 1:
        return points
    chunks = [points[start : start + stride] for start in range(0, len(points), stride)]
    return [(chunk[-1][0], sum(value for _, value in chunk) / len(chunk)) for chunk in chunks]


def _draw(axes: Axes, curve: Curve, points: Sequence[tuple[int, float]]) -> None:
    steps, values = zip(*points, strict=True)
    if curve.noisy:
        axes.plot(steps, values, color=ACCENT, linewidth=0.8, alpha=0.35)
    axes.plot(steps, _smooth(values) if curve.noisy else values, color=ACCENT, linewidth=1.6)
    if curve.log_scale and 0 < min(values) < max(values) / LOG_SCALE_FROM:
        axes.set_yscale("log")
    axes.set_title(curve.title, loc="left", fontweight="bold")
    axes.set_xlabel("step")
    axes.grid(alpha=0.15, color=INK)


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a window that shrinks at both ends, so that the curve neither lags nor starts elsewhere."""
    reach = int(len(values) * SMOOTHING)
    windows = (values[i - r : i + r + 1] for i in range(len(values)) for r in [min(reach, i, len(values) - 1 - i)])
    return [sum(window) / len(window) for window in windows]
