"""Blocks that run again in the backward: the same training to the bit, less kept for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests._batches import make_batch
from tests._recipes import assert_same_weights, small
from vlpfast.models import create_model
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.train.run import train


# Every kind of stack: towers and cross-attention, experts by modality, routed experts, decoders.
@pytest.mark.parametrize(
    "name",
    [
        "albef_scenes",
        "beit3_scenes_words",
        "uni_perceiver_moe_scenes",
        "blip_scenes",
        "metalm_scenes",
        "lxmert_scenes",
    ],
)
def test_trains_alike(name, scenes, tmp_path):
    config = small(name, scenes, tmp_path, steps=3)
    drops = {"dropout": 0.1, "attention_dropout": 0.1}
    stacks = {part: replace(getattr(config.model, part), **drops) for part in ("text", "fusion")}
    config = replace(config, name="kept", model=replace(config.model, **stacks))
    again = replace(config, name="again", train=replace(config.train, grad_checkpointing=True))
    assert_same_weights(train(config), train(again))


def test_keeps_less():
    kept = {}
    for enable in (False, True):
        torch.manual_seed(0)
        model = create_model("albef", "tiny", image_size=16).train()
        model.set_grad_checkpointing(enable)
        step = PretrainStep(model, ObjectivesConfig(itc=1, itm=1, mlm=1))
        sizes = {}

        def keep(tensor: torch.Tensor, sizes=sizes) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = step(make_batch(8), seed=0, step=0).losses
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept[enable] = sum(size for place, size in sizes.items() if place not in weights)
        sum(total / count for total, count in losses.values()).backward()
    assert kept[True] < 0.5 * kept[False], kept
