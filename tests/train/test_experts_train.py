"""Recipes of presets with experts on generated scenes, from shards to a probe: pre-training of
BEiT-3, resumed; VLMo's three stages one after the other.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlpfast import recipes
from vlpfast.config import to_dict
from vlpfast.data.scenes import write_shards
from vlpfast.eval.run import evaluate
from vlpfast.models import VLPModel, create_model, preset_config
from vlpfast.models.load import start_from
from vlpfast.train.optim import freeze
from vlpfast.train.run import train


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "val"
    write_shards(folder, num_samples=24, split="val", progress=False)
    return folder


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """The run folder of a tokenizer, untrained: its codes are random ones of patches."""
    torch.manual_seed(0)
    config = preset_config("vqkd", "tiny")
    config = replace(config, vision=replace(config.vision, dim=32, heads=2, depth=1))
    folder = tmp_path_factory.mktemp("guide")
    (folder / "config.json").write_text(json.dumps({"model": to_dict(config)}))
    save_file(VLPModel(config).state_dict(), folder / "model.safetensors")
    return folder


def small(name: str, scenes, logs, *, steps: int = 4, guide="", init="", depth: int = 2):
    """The recipe with 8 pairs a step, 32 wide, all its objectives in every step."""
    config = recipes.get(name)
    shape = {"dim": 32, "heads": 2}
    model = replace(
        config.model,
        vision=replace(config.model.vision, **shape),
        text=replace(config.model.text, **shape),
        fusion=replace(config.model.fusion, **shape, depth=depth),
    )
    return replace(
        config,
        model=model,
        objectives=replace(config.objectives, guide=str(guide), mix=()),
        data=replace(config.data, path=str(scenes), workers=1),
        train=replace(
            config.train,
            batch_size=8,
            steps=steps,
            save_every=2,
            log_every_n_steps=1,
            precision="fp32",
            report_to="none",
            logs=str(logs),
            init=str(init),
        ),
    )


def losses(run) -> list[set[str]]:
    rows = (run.run_dir / "metrics.jsonl").read_text().splitlines()
    return [set(json.loads(row)["losses"]) for row in rows]


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run.run_dir / "model.safetensors")


@pytest.mark.slow
def test_beit3_pretrains_resumes_and_is_tuned(scenes, guide, tmp_path):
    whole = small("beit3_scenes", scenes, tmp_path / "whole", guide=guide)
    train(whole)
    assert losses(whole) == 4 * [{"mlm", "mtm", "mim", "mvm"}]
    # Stopped after two steps and resumed, the weights are the same to the bit.
    again = small("beit3_scenes", scenes, tmp_path / "again", guide=guide)
    train(again, resume=str(whole.run_dir / "checkpoints" / "step_2.pt"))
    resumed = weights(again)
    assert [n for n, t in weights(whole).items() if not t.equal(resumed[n])] == []
    probe = evaluate(whole.run_dir, "mlm", scenes, progress=False)
    assert 0 <= probe.metrics["mlm_accuracy"] <= 100
    for task, metric in (("mim", "mim_accuracy"), ("linear", "linear_auc")):
        probe = evaluate(whole.run_dir, task, scenes, progress=False)
        assert 0 <= probe.metrics[metric] <= 100
    tuned = small("beit3_scenes_retrieval", scenes, tmp_path, init=whole.run_dir)
    train(tuned)
    log = (tuned.run_dir / "out.log").read_text()
    assert "fresh: image_projection.weight, scale, text_projection.weight" in log
    assert "left behind: code_head.bias" in log
    result = evaluate(tuned.run_dir, "retrieval", scenes, progress=False)
    assert 0 <= result.metrics["r_mean"] <= 100


@pytest.mark.slow
def test_vlmo_in_three_stages(scenes, guide, tmp_path):
    first = small("vlmo_scenes_images", scenes, tmp_path, guide=guide)
    train(first)
    second = small("vlmo_scenes_texts", scenes, tmp_path, init=first.run_dir)
    train(second)
    last = small("vlmo_scenes", scenes, tmp_path, init=second.run_dir)
    train(last)
    assert losses(first) == 4 * [{"mim"}]
    assert losses(second) == 4 * [{"mtm"}]
    assert losses(last) == 4 * [{"itc", "itm", "mlm"}]
    before, after = weights(first), weights(second)
    changed = {n for n in after if not after[n].equal(before[n])}
    assert changed
    assert all(
        ".text." in n or n.startswith(("text.", "token_head", "fusion.relative_bias"))
        for n in changed
    )
    assert any("fusion.blocks.1.mlp.text" in n for n in changed)
    result = evaluate(last.run_dir, "retrieval", scenes, progress=False, rerank_k=4)
    assert 0 <= result.metrics["itm_r_mean"] <= 100


def test_start_names_what_it_cannot_take(guide, tmp_path):
    model = create_model("clip", "tiny", vocab_size=50, image_size=16)
    with pytest.raises(ValueError, match=r"does not fit the model: .*here \("):
        start_from(model, guide)
    with pytest.raises(FileNotFoundError):
        start_from(model, tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = create_model("clip", "tiny", vocab_size=50, image_size=16)
    assert len(start_from(other, tmp_path)) == 1
    assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    torch.manual_seed(1)
    third = create_model("clip", "tiny", vocab_size=50, image_size=16)
    notes = start_from(third, tmp_path, ("text_projection.",))
    assert notes[1:] == ["fresh: text_projection.weight"]
    assert third.image_projection.weight.equal(model.image_projection.weight)
    assert not third.text_projection.weight.equal(model.text_projection.weight)


def test_freeze_names_what_fits_nothing():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    freeze(model, ("a.*",))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["b.weight", "b.bias"]
    with pytest.raises(ValueError, match=r"no parameter fits 'c\.\*'; known: a\.weight"):
        freeze(model, ("c.*",))
    with pytest.raises(ValueError, match="leaves nothing"):
        freeze(model, ("b.*",))


@pytest.mark.slow
def test_stochastic_depth_resumes_to_the_bit(scenes, tmp_path):
    def run(name: str, rate: float, resume: str | None = None):
        config = small("vlmo_scenes", scenes, tmp_path / name)
        fusion = replace(config.model.fusion, drop_path_rate=rate)
        return train(replace(config, model=replace(config.model, fusion=fusion)), resume=resume)

    whole, without = run("whole", 0.5), run("without", 0.0)
    again = run("again", 0.5, str(whole.run_dir / "checkpoints" / "step_2.pt"))
    assert again.step == whole.step == 4
    assert all(value.equal(weights(again)[name]) for name, value in weights(whole).items())
    assert any(not value.equal(weights(without)[name]) for name, value in weights(whole).items())
