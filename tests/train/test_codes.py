"""A teacher, a tokenizer that learns from it, and a model that learns the tokenizer's codes: each a
run, evaluated and resumed.
"""

import json
from dataclasses import replace

import pytest
import torch

from vlpfast import recipes
from vlpfast.data.scenes import write_shards
from vlpfast.eval.run import evaluate
from vlpfast.train.config import RunConfig
from vlpfast.train.run import train


def small(name: str, folder, *, guide: str = "", logs: str = "logs") -> RunConfig:
    """The recipe with 8 images a step, 32 wide."""
    config = recipes.get(name)
    model, shape = config.model, {"dim": 32, "heads": 2}
    if model.text.kind != "none":
        model = replace(model, text=replace(model.text, **shape))
    return replace(
        config,
        model=replace(model, vision=replace(model.vision, **shape)),
        objectives=replace(config.objectives, guide=guide and str(folder / "logs" / guide)),
        data=replace(config.data, path=str(folder / "val"), workers=1),
        train=replace(
            config.train,
            batch_size=8,
            steps=4,
            save_every=2,
            log_every_n_steps=1,
            precision="fp32",
            report_to="none",
            logs=str(folder / logs),
        ),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scenes, and the three runs one after the other."""
    folder = tmp_path_factory.mktemp("codes")
    write_shards(folder / "val", num_samples=24, split="val", progress=False)
    for name, guide in CHAIN.items():
        train(small(name, folder, guide=guide))
    return folder


CHAIN = {"clip_tiny": "", "vqkd_scenes": "clip_tiny", "beit2_scenes": "vqkd_scenes"}


@pytest.mark.slow
def test_each_run_names_its_guide(folder):
    for name, guide in CHAIN.items():
        if guide:
            kept, own = (
                json.loads(path.read_text())
                for path in (
                    folder / "logs" / name / "guide.json",
                    folder / "logs" / guide / "config.json",
                )
            )
            assert kept == own
    config = json.loads((folder / "logs/beit2_scenes/config.json").read_text())
    assert config["model"]["codes"] == 256
    assert config["objectives"]["guide"].endswith("vqkd_scenes")
    config = json.loads((folder / "logs/vqkd_scenes/config.json").read_text())
    assert config["model"]["codebook"]["target_dim"] == 128
    state = torch.load(folder / "logs/vqkd_scenes/checkpoints/step_4.pt", weights_only=True)[
        "state_dict"
    ]
    assert state["model.tokenizer.codebook.vectors"].shape == (256, 16)
    assert state["model.tokenizer.codebook.steps"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqkd_scenes", "beit2_scenes"])
def test_resumed_is_uninterrupted_to_the_bit(folder, name):
    again = small(name, folder, guide=CHAIN[name], logs="again")
    path = folder / "logs" / name / "checkpoints"
    resumed = train(again, resume=str(path / "step_2.pt"))
    one, two = (
        torch.load(p, weights_only=True)["state_dict"]
        for p in (path / "step_4.pt", resumed.checkpoint)
    )
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key], two[key]), key


@pytest.mark.slow
def test_another_guide_is_another_run(folder):
    other = replace(small("vqkd_scenes", folder, guide="clip_tiny", logs="other"), name="other")
    train(replace(other, train=replace(other.train, seed=1)))
    config = small("beit2_scenes", folder)
    config = replace(
        config, objectives=replace(config.objectives, guide=str(folder / "other/other"))
    )
    config = replace(config, train=replace(config.train, logs=str(folder / "third")))
    path = folder / "logs/beit2_scenes/checkpoints/step_2.pt"
    with pytest.raises(ValueError, match=r"cannot resume from .*: guide is "):
        train(config, resume=str(path))


@pytest.mark.slow
def test_runs_are_evaluated(folder):
    options = {"data": folder / "val", "device": "cpu", "progress": False}
    use = evaluate(folder / "logs/vqkd_scenes", "codes", **options)
    assert use.counts == {"num_images": 24, "num_codes": 256}
    assert use.chance["codebook_use"] == pytest.approx(100 / 256)
    assert use.metrics["codebook_use"] >= use.metrics["codebook_perplexity"] > 0
    told = evaluate(folder / "logs/beit2_scenes", "mim", **options)
    assert told.counts == {"num_images": 24, "num_hidden": 24 * 24}
    assert set(told.metrics) == {
        "mim_accuracy",
        "class_head_mim_accuracy",
        "shuffled_mim_accuracy",
    }
    linear = evaluate(folder / "logs/beit2_scenes", "linear", **options)
    assert set(linear.metrics) == {"linear_auc", "random_linear_auc"}
    with pytest.raises(ValueError, match="mim needs a code head; preset 'clip' has no code head"):
        evaluate(folder / "logs/clip_tiny", "mim", **options)
    config = folder / "logs/beit2_scenes/config.json"
    text = config.read_text()
    config.write_text(text.replace('"mim_reads": "image"', '"mim_reads": "pair"'))
    with pytest.raises(ValueError, match="mim tells codes from images alone"):
        evaluate(folder / "logs/beit2_scenes", "mim", **options)
    config.write_text(text)
    with pytest.raises(ValueError, match="codes needs a codebook; preset 'beit2' has no codebook"):
        evaluate(folder / "logs/beit2_scenes", "codes", **options)
