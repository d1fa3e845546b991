"""Masked image modelling and VQ-KD by DistributedDataParallel over 2 processes, against one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests._batches import make_batch
from tests.dist._run import run_distributed
from tests.dist.test_step_dist import rows_of
from vlpfast.data.batch import Batch
from vlpfast.data.masking import mask_patches
from vlpfast.layers.codebook import Codebook
from vlpfast.models import VLPModel, preset_config
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.train.distributed import World

ROWS, STEPS = 6, 3
CONFIGS = {
    "beit2": ObjectivesConfig(itc=0.0, mim=1.0),
    "vqkd": ObjectivesConfig(itc=0.0, vqkd=1.0),
}


def batch_of(number: int, rank: int, world: int) -> Batch:
    whole = make_batch(ROWS, image_size=32, seed=number)
    generator = torch.Generator().manual_seed(number)
    codes = torch.randint(0, 256, (ROWS, 16), generator=generator)
    features = torch.randn(ROWS, 16, 128, generator=generator)
    hidden = mask_patches(6, 4, seed=0, positions=whole.positions)
    own = torch.arange(rank, ROWS, world)
    share = rows_of(whole, rank, world)
    return replace(share, hidden_patches=hidden[own], codes=codes[own], features=features[own])


def train(rank: int, preset: str, world: int) -> dict[str, Tensor]:
    """Weights after a few steps of SGD."""
    torch.manual_seed(0)
    config = preset_config(preset, "tiny", image_size=32)
    # Which inputs codes begin as and are moved to depends on the split; so none are.
    codebook = replace(config.codebook, revive_below=0.0)
    vision = replace(config.vision, dim=32, heads=2)
    model = VLPModel(replace(config, vision=vision, codebook=codebook))
    if model.tokenizer is not None:
        model.tokenizer.codebook.steps += 1
    group = dist.group.WORLD if world > 1 else None
    step = PretrainStep(model, CONFIGS[preset], group)
    module = World(rank, world, torch.device("cpu")).wrap(step.train())
    for number in range(STEPS):
        ((loss, count),) = module(
            batch_of(number, rank, world), seed=number, step=number
        ).losses.values()
        count = count.double()
        if world > 1:
            dist.all_reduce(count)
        (loss * world / count).backward()
        with torch.no_grad():
            for parameter in step.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        step.finish_step()
    return step.state_dict()


@pytest.mark.dist
@pytest.mark.parametrize("preset", CONFIGS)
def test_training_equals_one_process(preset):
    expected = train(0, preset, 1)
    for weights in run_distributed(train, 2, preset, 2):
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def revive(rank: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    book = Codebook(11, 3, decay=0.5, revive_below=0.9)
    torch.manual_seed(rank)
    for _ in range(4):
        book(torch.randn(7, 3))
        book.update(3, dist.group.WORLD)
    return book.state_dict()


@pytest.mark.dist
def test_ranks_revive_the_same_codes():
    one, two = run_distributed(revive, 2)
    for name, value in one.items():
        assert value.equal(two[name]), name
