"""Tables, JSON and charts hold the numbers they were given."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vlpfast.eval.report import EvalResult, save_bars

RETRIEVAL = EvalResult(
    "retrieval",
    metrics={"txt_r1": 12.5, "txt_medr": 7, "itm_txt_r1": 23.75, "itm_txt_medr": 3},
    chance={"txt_r1": 0.125, "txt_medr": 400},
    counts={"num_images": 800, "num_texts": 4000},
    info={"run": "logs/albef", "seconds": 1.5},
)
SWAP = EvalResult(
    "swap",
    metrics={"swap_accuracy": 51.0, "itm_swap_accuracy": 83.1},
    chance={"swap_accuracy": 50.0},
    counts={"num_pairs": 321},
    intervals={"itm_swap_accuracy": (78.6, 86.8)},
)
MLM = EvalResult(
    "mlm",
    metrics={"mlm_accuracy": 71.0, "shuffled_mlm_accuracy": 33.0},
    chance={"mlm_accuracy": 9.5},
    counts={"num_masked": 77},
)


def cells(result: EvalResult) -> list[list[str]]:
    """The table's lines, cut at two or more spaces."""
    lines = result.table().splitlines()
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_table_puts_variants_and_chance_side_by_side() -> None:
    assert cells(RETRIEVAL) == [
        ["retrieval (800 images, 4000 texts)", "itc", "itm", "chance"],
        ["-" * len(RETRIEVAL.table().splitlines()[0])],
        ["txt_r1", "12.50", "23.75", "0.12"],
        ["txt_medr", "7.00", "3.00", "400.00"],
        ["run: logs/albef"],
        ["seconds: 1.5"],
    ]


def test_table_of_probes() -> None:
    assert cells(SWAP)[2] == ["swap_accuracy", "51.00", "83.10 [78.6, 86.8]", "50.00"]
    assert cells(MLM)[0] == ["mlm (77 masked)", "true image", "shuffled image", "chance"]
    assert cells(MLM)[2] == ["mlm_accuracy", "71.00", "33.00", "9.50"]


@pytest.mark.parametrize("result", [RETRIEVAL, SWAP, MLM], ids=lambda r: r.task)
def test_json_round_trip(result: EvalResult) -> None:
    assert EvalResult.from_json(result.to_json()) == result


@pytest.mark.parametrize("result", [RETRIEVAL, SWAP, MLM], ids=lambda r: r.task)
def test_bars_are_drawn(result: EvalResult, tmp_path: Path) -> None:
    save_bars(result, tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as image:
        colors = image.convert("RGB").getcolors(maxcolors=1 << 20)
        ink = {color for count, color in colors if count > 500}
    # White, black of the chance line, and the two bars in their colours.
    assert {(255, 255, 255), (31, 119, 180), (255, 127, 14)} <= ink
