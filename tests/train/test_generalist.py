"""MetaLM's recipe on generated scenes: from shards to answered questions, and resumed."""

from dataclasses import replace

import pytest
import torch

from vlpfast import recipes
from vlpfast.data.scenes import write_shards
from vlpfast.eval.run import evaluate
from vlpfast.train.run import train


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "val"
    write_shards(folder, num_samples=24, split="val", progress=False)
    return folder


def small(scenes, logs, steps: int = 6):
    """The recipe with 8 pairs a step, 32 wide, one block."""
    config = recipes.get("metalm_scenes")
    shape = {"dim": 32, "heads": 2}
    model = replace(
        config.model,
        vision=replace(config.model.vision, **shape, depth=1),
        text=replace(config.model.text, **shape),
        fusion=replace(config.model.fusion, **shape, depth=1),
    )
    settings = {"batch_size": 8, "steps": steps, "save_every": 4, "precision": "fp32"}
    return replace(
        config,
        model=model,
        data=replace(config.data, path=str(scenes), workers=1),
        train=replace(config.train, **settings, report_to="none", logs=str(logs)),
    )


@pytest.mark.slow
def test_trains_answers_and_resumes(scenes, tmp_path):
    whole = small(scenes, tmp_path / "whole")
    result = train(whole)
    assert set(result.losses) == {"lm"}
    probe = evaluate(whole.run_dir, "vqa", scenes, device="cpu", progress=False)
    assert probe.counts["num_questions"] > 24
    assert 0 <= probe.metrics["vqa_accuracy"] <= 100
    path = whole.run_dir / "checkpoints" / "step_4.pt"
    resumed = train(small(scenes, tmp_path / "again"), resume=str(path))
    weights = (torch.load(r.checkpoint, weights_only=True)["state_dict"] for r in (result, resumed))
    for (key, one), two in zip(next(weights).items(), next(weights).values(), strict=True):
        assert torch.equal(one, two), key


def test_prompt_and_text_must_both_fit(scenes, tmp_path):
    config = small(scenes, tmp_path)
    data = replace(config.data, max_tokens=40)
    with pytest.raises(ValueError, match="must be at most half, got 40"):
        train(replace(config, data=data))
