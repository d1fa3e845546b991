"""Fine-tuning on generated scenes: from a pre-training run to answers about one image and two."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests._recipes import assert_same_weights, small
from vlpfast.data.scenes import write_shards
from vlpfast.eval.run import evaluate
from vlpfast.models import VLPModel
from vlpfast.recipes import get
from vlpfast.train.optim import param_groups
from vlpfast.train.run import train


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A shard of 100 generated scenes and 40 statements about pairs of them."""
    folder = tmp_path_factory.mktemp("pairs") / "val"
    write_shards(folder, num_samples=100, split="val", num_pairs=40, progress=False)
    return folder / "val.nlvr.jsonl"


@pytest.fixture(scope="module")
def pretrained(pairs, tmp_path_factory):
    config = small("albef_scenes", pairs.parent, tmp_path_factory.mktemp("runs"), 1)
    train(config)
    return config.run_dir


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vqa", "entailment", "nlvr"])
def test_goes_on_from_a_run_answers_and_resumes(task, pairs, pretrained, tmp_path):
    name = {"vqa": "albef_scenes_vqa", "entailment": "albef_scenes_ve"}.get(task)
    data = pairs.parent if name else pairs
    whole = small(name or "albef_scenes_nlvr", data, tmp_path / "whole", init=str(pretrained))
    whole = replace(whole, data=replace(whole.data, answers_at_least=1))
    result = train(whole)
    assert set(result.losses) == {"qa"}
    started = (whole.run_dir / "out.log").read_text()
    assert "fresh: answer_head." in started
    assert "left behind: " in started
    probe = evaluate(whole.run_dir, task, data, device="cpu", progress=False)
    assert probe.counts["num_samples"] == (40 if task == "nlvr" else 100)
    assert 0 <= probe.metrics[f"{task}_accuracy"] <= 100
    answers = json.loads((whole.run_dir / "eval" / "answers" / f"{task}-1.json").read_text())
    assert {row["answer"] for row in answers} <= set(
        json.loads((whole.run_dir / "answers.json").read_text())
    )
    path = whole.run_dir / "checkpoints" / "step_4.pt"
    train_again = replace(whole.train, logs=str(tmp_path / "again"))
    assert_same_weights(result, train(replace(whole, train=train_again), resume=str(path)))


@pytest.mark.slow
def test_a_head_for_one_image_is_not_one_for_two(pairs, pretrained, tmp_path):
    one = small("albef_scenes_ve", pairs.parent, tmp_path, 1, init=str(pretrained))
    train(one)
    two = small("albef_scenes_nlvr", pairs, tmp_path, 1, init=str(one.run_dir))
    train(two)
    assert "fresh: answer_head." in (two.run_dir / "out.log").read_text()
    config = json.loads((two.run_dir / "config.json").read_text())
    assert config["model"]["answer_images"] == 2


def test_recipes_learn_the_head_faster():
    for task, targets in (("vqa", "scores"), ("ve", "one"), ("nlvr", "one")):
        config = get(f"albef_scenes_{task}")
        assert config.objectives.weights.keys() == {"qa"}
        assert config.objectives.qa_targets == targets
        model = VLPModel(replace(config.model, answers=3))
        groups = param_groups(model, config.optim)
        rates = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        head = {id(p) for p in model.answer_head.parameters()}
        assert {rate for p, rate in rates.items() if p in head} == {10.0}
        assert {rate for p, rate in rates.items() if p not in head} == {1.0}
        # Nothing is trained that the answers do not read.
        assert model.token_head is None
        assert model.match_head is None
        assert isinstance(model.scale, torch.Tensor) is False
