"""Recipes of writing systems on generated scenes, from shards to captions; tied tensors survive."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests._recipes import assert_same_weights, small
from vlpfast.eval.load import load_run
from vlpfast.eval.run import evaluate
from vlpfast.train.ema import Ema
from vlpfast.train.optim import param_groups
from vlpfast.train.run import train

LOSSES = {"coca_scenes": {"itc", "lm"}, "blip_scenes": {"itc", "itm", "lm"}}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_trains_writes_and_resumes(name, scenes, tmp_path):
    whole = small(name, scenes, tmp_path / "whole", ema_decay=0.9)
    result = train(whole)
    rows = (whole.run_dir / "metrics.jsonl").read_text().splitlines()
    assert {loss for row in rows for loss in json.loads(row)["losses"]} == LOSSES[name]
    for num_beams in (1, 3):
        probe = evaluate(
            whole.run_dir, "caption", scenes, device="cpu", progress=False, num_beams=num_beams
        )
        assert probe.counts["num_samples"] == 24
    if "itm" in LOSSES[name]:
        options = {"rerank_k": 4, "itc_weight": 1.0, "device": "cpu", "progress": False}
        assert "itm_txt_r1" in evaluate(whole.run_dir, "retrieval", scenes, **options).metrics
    # Stopped after four steps and resumed, the weights are the same to the bit.
    path = whole.run_dir / "checkpoints" / "step_4.pt"
    resumed = train(small(name, scenes, tmp_path / "again", ema_decay=0.9), resume=str(path))
    assert_same_weights(result, resumed)


def test_tied_tensors_are_trained_averaged_and_exported_once_under_all_their_names(
    scenes, tmp_path
):
    config = small("blip_scenes", scenes, tmp_path, 2)
    train(config)
    exported = load_file(config.run_dir / "model.safetensors")
    model = load_run(config.run_dir, device="cpu").model
    state = model.state_dict()
    assert exported.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(exported[name], value), name
    tied = [f"{tower}.blocks.0.mlp.fc1.weight" for tower in ("text", "fusion", "decoder")]
    assert all(torch.equal(exported[name], exported[tied[0]]) for name in tied)
    assert model.decoder.blocks[0].mlp is model.text.blocks[0].mlp
    # The optimizer and the average hold each tensor once, the average's export all names.
    params = [p for group in param_groups(model, config.optim) for p in group["params"]]
    assert len(params) == len({p.data_ptr() for p in params}) == len(list(model.parameters()))
    ema = Ema(model, 0.5)
    with torch.no_grad():
        model.text.blocks[0].mlp.fc1.weight.add_(1.0)
    ema.update()
    averaged = ema.averaged_state_dict(model)
    assert averaged.keys() == state.keys()
    for name in tied:
        torch.testing.assert_close(averaged[name], exported[name] + 0.5)
