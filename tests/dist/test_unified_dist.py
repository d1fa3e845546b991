"""Words, and images written from their prompts, by DistributedDataParallel over 2 processes,
against one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from tests._batches import make_batch
from tests.dist._run import run_distributed
from torch import Tensor

from vlpfast.data.batch import Batch
from vlpfast.models import VLPModel, preset_config
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.ragged import Ragged
from vlpfast.train.distributed import World

ROWS, STEPS, WORDS, CODES, PATCHES = 6, 3, 50, 8, 4
CONFIG = ObjectivesConfig(itc=0.0, lm=1.0)


def batch_of(number: int, rank: int, world: int) -> Batch:
    """Every third row draws: of two ranks each has one, of batch 2 one rank has all."""
    whole = make_batch(ROWS, seed=number, vocab_size=WORDS, masked=False)
    generator = torch.Generator().manual_seed(number)
    codes = torch.randint(WORDS, WORDS + CODES, (ROWS, PATCHES), generator=generator).tolist()
    drawn = [1, 3, 5] if number == 2 else [0, 3]
    own = list(range(rank, ROWS, world))
    texts, prompts = [], []
    for row in own:
        text = whole.text.select(torch.tensor([row])).values.tolist()
        texts.append([1, *codes[row], 2] if row in drawn else text)
        prompts.append([1, *range(5, 6 + row), 2])
    rows = torch.tensor([place for place, row in enumerate(own) if row in drawn])
    return replace(
        whole,
        images=whole.images[own],
        text=Ragged.from_lists(texts),
        prompt=Ragged.from_lists(prompts),
        drawn=rows.long(),
        image_ids=whole.image_ids[own],
        sample_ids=whole.sample_ids[own],
        positions=whole.positions[own],
    )


def train(rank: int, world: int) -> dict[str, Tensor]:
    """Weights after a few steps of SGD."""
    torch.manual_seed(0)
    config = preset_config("unified-io", "tiny", vocab_size=WORDS, image_size=16)
    shape = {"dim": 32, "heads": 2}
    model = VLPModel(
        replace(
            config,
            vision=replace(config.vision, **shape),
            text=replace(config.text, **shape, image_codes=CODES),
            fusion=replace(config.fusion, **shape, depth=1),
        )
    )
    step = PretrainStep(model, CONFIG, dist.group.WORLD if world > 1 else None)
    module = World(rank, world, torch.device("cpu")).wrap(step.train())
    for number in range(STEPS):
        batch = batch_of(number, rank, world)
        loss, count = module(batch, seed=number, step=number).losses["lm"]
        count = count.double()
        if world > 1:
            dist.all_reduce(count)
        (loss * world / count).backward()
        with torch.no_grad():
            for parameter in step.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return step.state_dict()


@pytest.mark.dist
def test_training_equals_one_process():
    expected = train(0, 1)
    for weights in run_distributed(train, 2, 2):
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
