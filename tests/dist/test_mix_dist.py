"""One objective a step, by DistributedDataParallel over 2 processes, against one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests._batches import make_batch, make_regions
from tests.dist._run import run_distributed
from tests.dist.test_step_dist import rows_of
from vlpfast.data.batch import Batch
from vlpfast.data.masking import mask_regions
from vlpfast.models import create_model
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.recipes import lxmert, vilbert
from vlpfast.train.distributed import World

# Without ITM: its other images are those of a rank, so they differ by design.
CONFIGS = {
    "uniter": ObjectivesConfig(
        itc=0.0, mlm=1.0, mrfr=1.0, mrckl=1.0, mix=(("mlm", 2.0), ("mrfr", 1.0), ("mrckl", 1.0))
    ),
    "lxmert": replace(lxmert.OBJECTIVES, itm=0.0, mix=(("mlm", 2.0), ("mrfr", 1.0), ("mrc", 1.0))),
    "vilbert": replace(vilbert.OBJECTIVES, itm=0.0, mix=(("mlm", 1.0), ("mrckl", 1.0))),
}
ROWS, STEPS = 6, 6


def batch_of(number: int, rank: int, world: int) -> Batch:
    whole = make_batch(ROWS, seed=number)
    regions = make_regions(ROWS, seed=number)
    own = torch.arange(rank, ROWS, world)
    share = rows_of(whole, rank, world)
    hidden = mask_regions(regions, seed=0, positions=whole.positions)
    return replace(share, regions=regions[own], masked_regions=hidden[own])


def train(rank: int, world: int, preset: str) -> tuple[dict[str, Tensor], list[str]]:
    """Weights and the names of the losses after a few steps of SGD."""
    torch.manual_seed(0)
    step = PretrainStep(create_model(preset, "tiny", vocab_size=50), CONFIGS[preset])
    module = World(rank, world, torch.device("cpu")).wrap(step.train())
    names = []
    for number in range(STEPS):
        losses = module(batch_of(number, rank, world), seed=number, step=number).losses
        ((name, (loss, count)),) = losses.items()
        count = count.double()
        if world > 1:
            dist.all_reduce(count)
        (loss * world / count).backward()
        names.append(name)
        with torch.no_grad():
            for parameter in step.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
    return step.state_dict(), names


@pytest.mark.dist
@pytest.mark.parametrize("preset", CONFIGS)
def test_training_equals_one_process(preset):
    expected, names = train(0, 1, preset)
    assert set(names) == CONFIGS[preset].weights.keys()
    for weights, trained in run_distributed(train, 2, 2, preset):
        assert trained == names
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
