"""PaLI's recipe on generated scenes: one checkpoint that writes captions and answers, resumed."""

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
    config = recipes.get("pali_scenes")
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
def test_one_checkpoint_is_asked_by_prompt_and_resumes(scenes, tmp_path):
    whole = small(scenes, tmp_path / "whole")
    # Prompt and text have positions of their own: together they may pass the context.
    assert 2 * whole.data.max_tokens > whole.model.text.context_length >= whole.data.max_tokens
    result = train(whole)
    assert set(result.losses) == {"lm"}
    probe = evaluate(whole.run_dir, "vqa", scenes, device="cpu", progress=False)
    assert probe.counts["num_questions"] > 24
    assert 0 <= probe.metrics["shuffled_vqa_accuracy"] <= 100
    written = evaluate(whole.run_dir, "caption", scenes, device="cpu", progress=False, num_beams=2)
    assert written.counts["num_samples"] == 24
    assert 0 <= written.metrics["exact_match"] <= 100
    path = whole.run_dir / "checkpoints" / "step_4.pt"
    resumed = train(small(scenes, tmp_path / "again"), resume=str(path))
    weights = (torch.load(r.checkpoint, weights_only=True)["state_dict"] for r in (result, resumed))
    for (key, one), two in zip(next(weights).items(), next(weights).values(), strict=True):
        assert torch.equal(one, two), key
