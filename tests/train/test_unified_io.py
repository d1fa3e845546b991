"""Unified-IO's recipe on generated scenes: a tokenizer, then one checkpoint for words, boxes and
images; evaluated, resumed, exported, read again.
"""

import json
from dataclasses import replace

import pytest
import torch

from tests._recipes import assert_same_weights, small
from vlpfast import recipes
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.eval.run import evaluate
from vlpfast.models.load import load_model
from vlpfast.train.run import train


def unified(scenes, logs, guide=""):
    name = "unified_io_scenes" if guide else "unified_io_scenes_words"
    config = small(name, scenes, logs)
    return replace(config, objectives=replace(config.objectives, guide=str(guide)))


@pytest.mark.slow
def test_a_run_writes_words_boxes_and_images_and_resumes(scenes, tmp_path):
    teacher = small("clip_tiny", scenes, tmp_path)
    train(teacher)
    guide = small("vqkd_scenes", scenes, tmp_path)
    train(replace(guide, objectives=replace(guide.objectives, guide=str(teacher.run_dir))))
    whole = unified(scenes, tmp_path / "whole", guide.run_dir)
    result = train(whole)
    assert set(result.losses) == {"lm"}
    text = json.loads((whole.run_dir / "config.json").read_text())["model"]["text"]
    tokenizer = Tokenizer.load(whole.run_dir / "tokenizer.json")
    assert text["vocab_size"] == tokenizer.vocab_size
    assert tokenizer.locations == range(tokenizer.vocab_size - 64, tokenizer.vocab_size)
    model, _ = load_model(whole.run_dir, str(whole.run_dir / "model.safetensors"))
    assert len(model.text.embedding.token) == tokenizer.vocab_size + 256

    options = {"data": scenes, "device": "cpu", "progress": False}
    box = evaluate(whole.run_dir, "box", **options)
    assert box.counts["num_samples"] <= 24 < box.counts["num_boxes"]
    assert 0 < box.chance["box_accuracy"] < 100
    image = evaluate(whole.run_dir, "image", **options)
    assert image.counts == {"num_images": 24, "num_codes": 24 * 64}
    for task in ("vqa", "caption"):
        assert evaluate(whole.run_dir, task, **options).counts["num_samples"] == 24

    path = whole.run_dir / "checkpoints" / "step_4.pt"
    resumed = train(unified(scenes, tmp_path / "again", guide.run_dir), resume=str(path))
    assert_same_weights(result, resumed)


@pytest.mark.slow
def test_the_vocabulary_does_not_depend_on_what_is_trained(scenes, tmp_path):
    shapes = []
    for name, tasks in {"some": ("box",), "others": ("caption", "vqa")}.items():
        config = unified(scenes, tmp_path / name)
        # One tokenizer: its words, not what is asked, decide how many rows a table has.
        kept = tmp_path / "some" / "unified_io_scenes_words" / "tokenizer.json"
        data = replace(config.data, tasks=tasks, tokenizer=str(kept) if kept.exists() else "train")
        state = torch.load(train(replace(config, data=data)).checkpoint, weights_only=True)
        shapes.append({n: t.shape for n, t in state["state_dict"].items() if hasattr(t, "shape")})
    assert shapes[0] == shapes[1]
    run = tmp_path / "some" / "unified_io_scenes_words"
    with pytest.raises(ValueError, match="image tells a tokenizer's codes: the model was trained"):
        evaluate(run, "image", scenes, device="cpu", progress=False)


def test_what_is_missing_says_so(scenes, tmp_path):
    config = unified(scenes, tmp_path)
    drawing = replace(config, data=replace(config.data, tasks=("image",)))
    with pytest.raises(ValueError, match=r"data\.tasks 'image' needs objectives\.guide"):
        train(drawing)
    for size in ("tiny", "small", "base"):
        recipe = recipes.get(f"unified_io_{size}")
        assert recipe.data.locations == 1000
        assert recipe.model.size == size
