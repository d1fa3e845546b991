"""PaLI's recipe on generated scenes: one checkpoint that writes captions and answers, resumed."""

import pytest

from tests._recipes import assert_same_weights, small
from vlpfast.eval.run import evaluate
from vlpfast.train.run import train


@pytest.mark.slow
def test_one_checkpoint_is_asked_by_prompt_and_resumes(scenes, tmp_path):
    whole = small("pali_scenes", scenes, tmp_path / "whole")
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
    resumed = train(small("pali_scenes", scenes, tmp_path / "again"), resume=str(path))
    assert_same_weights(result, resumed)
