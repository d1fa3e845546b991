"""Sigmoid and hinge over 2 and 4 processes against one process on the concatenated batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests._batches import make_batch
from tests.dist._run import run_distributed
from vlpfast.models import create_model
from vlpfast.objectives import ObjectivesConfig, PretrainStep

RUNS = {
    "siglip": ObjectivesConfig(itc=0.0, sigmoid=1.0),
    "vse++": ObjectivesConfig(itc=0.0, hinge=1.0),
}
ROWS = 8


def gradients(rank: int, world: int, preset: str) -> dict[str, Tensor]:
    """Mean over ranks of the gradient of this rank's share of one batch."""
    torch.manual_seed(0)
    model = create_model(preset, "tiny", vocab_size=50, image_size=16).double()
    group = dist.group.WORLD if world > 1 else None
    step = PretrainStep(model, RUNS[preset], group).double().train()
    batch, own = make_batch(ROWS, masked=False), torch.arange(rank, ROWS, world)
    batch = replace(
        batch,
        images=batch.images[own],
        text=batch.text.select(own),
        image_ids=batch.image_ids[own],
        positions=batch.positions[own],
    )
    ((loss, count),) = step(batch, seed=0, step=0).losses.values()
    (loss / count).backward()
    found = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}
    if group is not None:
        for value in found.values():
            dist.all_reduce(value)
            value /= world
    return found


@pytest.mark.dist
@pytest.mark.parametrize("preset", RUNS)
@pytest.mark.parametrize("world", [2, 4])
def test_gradient_equals_one_process(world, preset):
    expected = gradients(0, 1, preset)
    for found in run_distributed(gradients, world, world, preset):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-10, msg=name)
