"""MetaLM's recipe on generated scenes: from shards to answered questions, and resumed."""

from dataclasses import replace

import pytest

from tests._recipes import assert_same_weights, small
from vlpfast.eval.run import evaluate
from vlpfast.train.run import train


@pytest.mark.slow
def test_trains_answers_and_resumes(scenes, tmp_path):
    whole = small("metalm_scenes", scenes, tmp_path / "whole")
    result = train(whole)
    assert set(result.losses) == {"lm"}
    probe = evaluate(whole.run_dir, "vqa", scenes, device="cpu", progress=False)
    assert probe.counts["num_questions"] > 24
    assert 0 <= probe.metrics["vqa_accuracy"] <= 100
    path = whole.run_dir / "checkpoints" / "step_4.pt"
    resumed = train(small("metalm_scenes", scenes, tmp_path / "again"), resume=str(path))
    assert_same_weights(result, resumed)


def test_prompt_and_text_must_both_fit(scenes, tmp_path):
    config = small("metalm_scenes", scenes, tmp_path)
    data = replace(config.data, max_tokens=40)
    with pytest.raises(ValueError, match="must be at most half, got 40"):
        train(replace(config, data=data))
