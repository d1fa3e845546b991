"""The loss curves of a run as one picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from vlpfast.train.checkpoint import write_atomic

# Share of the logged points that one smoothed value averages over.
_SMOOTHING_SPAN = 0.05


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Exponential average over about `span` points, without the bias of its start.

    s_t = sum_{i <= t} d^(t - i) x_i / sum_{i <= t} d^(t - i), d = 1 - 2 / (span + 1).
    """
    decay = max(0.0, 1 - 2 / (span + 1))
    total = weight = 0.0
    averages = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        averages.append(total / weight)
    return averages


def plot_losses(metrics: Path, out: Path, title: str) -> None:
    """Draws every loss in `metrics` (metrics.jsonl) over the steps, a panel each, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    names = list(dict.fromkeys(name for row in rows for name in row["losses"]))
    if not names:
        return
    columns = min(len(names), 2)
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(5.5 * columns, 3.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for i, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, i + 1)
        points = [(r["step"], r["losses"][name]) for r in rows if name in r["losses"]]
        steps, values = zip(*points, strict=True)
        averages = smooth(values, max(1.0, _SMOOTHING_SPAN * len(values)))
        axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1)
        axes.plot(steps, averages, color="tab:blue", linewidth=2)
        axes.set_title(f"{name}: {averages[-1]:.4g} at step {steps[-1]}", fontsize=11)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    write_atomic(out, lambda path: figure.savefig(path, dpi=110, format="png"))
