"""Presets with experts by DistributedDataParallel over 2 processes, against one process: experts
that a step leaves without tokens, and two pairs of embeddings.
"""

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
from vlpfast.models import create_model
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.train.distributed import World

WORDS = ObjectivesConfig(itc=0.0, mlm=1.0, mtm=1.0)
# Model options and objectives of each case.
CASES = {
    "beit3-all": ("beit3", {"embed_dim": 0, "codes": 9}, replace(WORDS, mim=1.0, mvm=1.0)),
    "beit3-words": ("beit3", {"embed_dim": 0, "codes": 0}, WORDS),
    "vlmo": (
        "vlmo",
        {"codes": 0},
        ObjectivesConfig(itc=1.0, itm=1.0, mlm=0.25, itm_negatives="hard-global"),
    ),
}
ROWS, STEPS = 6, 3


def batch_of(number: int, rank: int, world: int) -> Batch:
    own = torch.arange(rank, ROWS, world)
    share = rows_of(make_batch(ROWS, seed=number), rank, world)
    return replace(
        share,
        masked_alone=share.masked_text,
        alone_labels=share.mlm_labels,
        hidden_patches=torch.tensor([[0, 2], [1, 3], [0, 3], [1, 2], [2, 3], [0, 1]])[own],
        codes=(torch.arange(4 * ROWS).unflatten(0, (ROWS, 4)) % 9)[own],
    )


def train(rank: int, world: int, case: str) -> dict[str, Tensor]:
    """Weights after a few steps of SGD."""
    torch.manual_seed(0)
    preset, options, config = CASES[case]
    model = create_model(preset, "tiny", vocab_size=50, image_size=16, **options).double()
    group = dist.group.WORLD if world > 1 else None
    step = PretrainStep(model, config, group).train()
    module = World(rank, world, torch.device("cpu")).wrap(step)
    for number in range(STEPS):
        losses = module(batch_of(number, rank, world), seed=number, step=number).losses
        total = 0.0
        for name, (loss, count) in losses.items():
            count = count.double()
            if group is not None:
                dist.all_reduce(count)
            total = total + config.weights[name] * loss * world / count
        total.backward()
        with torch.no_grad():
            for parameter in step.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
                    parameter.grad = None
        step.finish_step()
    return step.state_dict()


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_training_equals_one_process(case):
    expected = train(0, 1, case)
    for weights in run_distributed(train, 2, 2, case):
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
