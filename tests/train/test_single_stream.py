"""The recipes of single-stream and two-stream systems on generated scenes, from shards to a probe,
and resumed.
"""

import json
from dataclasses import replace

import pytest

from tests._recipes import assert_same_weights, small
from vlpfast.eval.run import evaluate
from vlpfast.train.run import train

LOSSES = {
    "vilt_scenes": {"itm", "mlm", "wra"},
    "uniter_scenes": {"itm", "mlm", "wra", "mrfr", "mrckl"},
    "pixel_bert_scenes": {"itm", "mlm"},
    "uni_perceiver_scenes": {"itc", "mlm", "lm", "classify"},
    "uni_perceiver_moe_scenes": {"itc", "mlm", "lm", "classify"},
    "lxmert_scenes": {"itm", "mlm", "mrfr", "mrc"},
    "lxmert_scenes_answers": {"itm", "mlm", "mrfr", "mrc", "mra", "qa"},
    "vilbert_scenes": {"itm", "mlm", "mrckl"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_trains_evaluates_and_resumes(name, scenes, tmp_path):
    whole = small(name, scenes, tmp_path / "whole", 6)
    result = train(whole)
    rows = (whole.run_dir / "metrics.jsonl").read_text().splitlines()
    seen = {loss for row in rows for loss in json.loads(row)["losses"]}
    assert seen <= LOSSES[name]
    assert seen == LOSSES[name] or whole.objectives.mix
    probe = evaluate(whole.run_dir, "mlm", scenes, device="cpu", progress=False)
    assert probe.counts["num_samples"] > 0
    # Stopped after four steps and resumed, the weights are the same to the bit.
    path = whole.run_dir / "checkpoints" / "step_4.pt"
    again = small(name, scenes, tmp_path / "again", 6)
    resumed = train(again, resume=str(path))
    assert_same_weights(result, resumed)


def test_regions_are_aligned_by_name(scenes, tmp_path):
    config = small("uniter_scenes", scenes, tmp_path, 2)
    train(config)
    result = evaluate(config.run_dir, "align", scenes, device="cpu", progress=False)
    assert result.chance["region_mass"] == pytest.approx(100 / 8)
    assert 0 < result.metrics["region_mass"] < 100
    with pytest.raises(ValueError, match="retrieval ranks by embeddings in a joint space; preset"):
        evaluate(config.run_dir, "retrieval", scenes, device="cpu", progress=False)


@pytest.mark.parametrize("name", ["lxmert_scenes", "vilbert_scenes"])
def test_streams_apart_have_probes_of_words_and_pairs(name, scenes, tmp_path):
    config = small(name, scenes, tmp_path, 1)
    assert config.objectives.masking == "together"
    train(config)
    result = evaluate(config.run_dir, "swap", scenes, device="cpu", progress=False)
    assert set(result.metrics) == {"itm_swap_accuracy"}
    with pytest.raises(ValueError, match="align needs a model that reads regions beside words"):
        evaluate(config.run_dir, "align", scenes, device="cpu", progress=False)


@pytest.mark.slow
def test_images_of_unlike_sizes_train_and_resume(scenes, tmp_path):
    def run(folder):
        config = small("vilt_scenes", scenes, tmp_path / folder, 6)
        data = replace(config.data, crop_scale=(0.3, 1.0), max_aspect=2.0, size_multiple=8)
        vision = replace(config.model.vision, max_patches=50)
        # All objectives in every step.
        objectives = replace(config.objectives, mix=())
        model = replace(config.model, vision=vision)
        return replace(config, data=data, model=model, objectives=objectives)

    whole, again = run("whole"), run("again")
    result = train(whole)
    assert set(result.losses) == {"itm", "mlm", "wra"}
    probe = evaluate(whole.run_dir, "mlm", scenes, device="cpu", progress=False)
    assert probe.counts["num_samples"] > 0
    path = whole.run_dir / "checkpoints" / "step_4.pt"
    assert_same_weights(result, train(again, resume=str(path)))
