"""The loss curves: smoothing by its formula, and a picture with something in it."""

import json

import pytest
from PIL import Image

from vlpfast.train.plots import plot_losses, smooth


def test_smooth():
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    decay = 1 - 2 / (4 + 1)
    expected = [
        sum(decay ** (t - i) * values[i] for i in range(t + 1))
        / sum(decay ** (t - i) for i in range(t + 1))
        for t in range(5)
    ]
    assert smooth(values, 4) == pytest.approx(expected)
    assert smooth(values, 1) == values


def test_picture(tmp_path):
    rows = [{"step": s, "losses": {"itc": 5 / s, "mlm": 7 / s, "itm": 0.6}} for s in range(1, 40)]
    metrics, out = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_losses(metrics, out, "run")
    with Image.open(out) as image:
        assert min(image.size) > 300
        # Two rows of two panels, the last one empty: drawn lines are blue.
        pixels = image.convert("RGB").getcolors(1 << 20)
    assert sum(n for n, (r, g, b) in pixels if b > r + 60) > 500


def test_no_rows_no_picture(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("")
    plot_losses(metrics, tmp_path / "loss.png", "run")
    assert not (tmp_path / "loss.png").exists()
