"""K-means centres of a CNN's cells, and X-LXMERT that learns them: each a run, resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests._recipes import assert_same_weights, small
from vlpfast import recipes
from vlpfast.eval.run import evaluate
from vlpfast.train.config import RunConfig
from vlpfast.train.run import train


def cells(scenes: Path, logs: Path, **settings) -> RunConfig:
    """The recipe with 8 pairs a step; its CNN is as wide as it is."""
    config = recipes.get("kmeans_scenes")
    cut = small("vilt_scenes", scenes, logs, **settings)
    text = replace(config.model.text, dim=32, heads=2, depth=1)
    return replace(
        config,
        model=replace(config.model, text=text),
        data=replace(config.data, path=str(scenes), workers=1),
        train=cut.train,
    )


@pytest.mark.slow
def test_centres_then_codes(scenes, tmp_path):
    first = cells(scenes, tmp_path / "logs")
    result = train(first)
    assert set(result.losses) == {"itc", "kmeans"}
    path = first.run_dir / "checkpoints" / "step_4.pt"
    assert_same_weights(result, train(cells(scenes, tmp_path / "again"), resume=str(path)))
    use = evaluate(first.run_dir, "codes", scenes, device="cpu", progress=False)
    assert use.counts["num_codes"] == 256
    assert use.metrics["codebook_use"] > use.chance["codebook_use"]
    # A frozen CNN stays as the run before left it, and its centres are what learns.
    frozen = cells(
        scenes, tmp_path / "frozen", steps=2, init=str(first.run_dir), freeze=("vision.*",)
    )
    train(frozen)
    second = small("x_lxmert_scenes", scenes, tmp_path / "logs", 6)
    # All objectives in every step.
    changes = {"guide": str(first.run_dir), "mim_mask": "even", "mix": ()}
    objectives = replace(second.objectives, **changes)
    second = replace(second, objectives=objectives)
    learned = train(second)
    assert set(learned.losses) == {"itm", "mlm", "mvm"}
    path = second.run_dir / "checkpoints" / "step_4.pt"
    again = replace(second, train=replace(second.train, logs=str(tmp_path / "again")))
    assert_same_weights(learned, train(again, resume=str(path)))
