"""PretrainStep over 2 and 4 processes against one process on the concatenated batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests._batches import make_batch
from tests.dist._run import run_distributed
from vlpfast.data.batch import Batch
from vlpfast.models import create_model
from vlpfast.objectives import ObjectivesConfig, PretrainStep

# Negatives of all ranks: those of the rows of a rank, as in ALBEF, would differ by design.
MATCHING = {"itc": 1.0, "itm": 1.0, "itm_negatives": "hard-global"}
TEACHER = {"momentum": 0.9, "queue_size": 16, "alpha": 0.4}
CONFIGS = {
    "albef": ObjectivesConfig(mlm=1.0, **MATCHING, **TEACHER),
    "coca": ObjectivesConfig(itc=1.0, lm=2.0),
    "blip": ObjectivesConfig(lm=1.0, lm_label_smoothing=0.1, **MATCHING, **TEACHER),
}
ROWS, STEPS = 8, 3


def rows_of(batch: Batch, rank: int, world: int) -> Batch:
    """Rows of rank `rank`, as the stream deals them out: every `world`-th."""
    own = torch.arange(rank, len(batch), world)
    tokens, _ = batch.text.token_ids_of(own)
    text = batch.text.select(own)
    return Batch(
        images=batch.images[own],
        text=text,
        image_ids=batch.image_ids[own],
        sample_ids=batch.sample_ids[own],
        positions=batch.positions[own],
        masked_text=text.with_values(batch.masked_text.values[tokens]),
        mlm_labels=batch.mlm_labels[tokens],
    )


def train(rank: int, world: int, preset: str) -> dict[str, Tensor]:
    """Weights, teacher and queue after a few steps of SGD on this rank's share of the batches."""
    torch.manual_seed(0)
    model = create_model(preset, "tiny", vocab_size=50, image_size=16).double()
    group = dist.group.WORLD if world > 1 else None
    step = PretrainStep(model, CONFIGS[preset], group).double().train()
    for number in range(STEPS):
        batch = rows_of(make_batch(ROWS, seed=number), rank, world)
        total = 0.0
        for loss, count in step(batch, seed=number, step=number).losses.values():
            count = count.double()
            if group is not None:
                dist.all_reduce(count)
            total = total + loss * world / count
        total.backward()
        for parameter in model.parameters():
            if group is not None and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world
            if parameter.grad is not None:
                parameter.data -= 0.1 * parameter.grad
                parameter.grad = None
        step.finish_step()
    weights = {
        name: value for name, value in step.state_dict().items() if isinstance(value, Tensor)
    }
    if step.queue is None:
        return weights
    order = step.queue.ids[:ROWS].argsort()
    weights["queue.image"] = step.queue.image[:ROWS][order]
    weights["queue.text"] = step.queue.text[:ROWS][order]
    weights["queue.ids"] = step.queue.ids[:ROWS][order]
    return weights


@pytest.mark.dist
@pytest.mark.parametrize(
    ("preset", "world"), [("albef", 2), ("albef", 4), ("coca", 2), ("blip", 2), ("blip", 4)]
)
def test_training_equals_one_process(preset, world):
    expected = train(0, 1, preset)
    for weights in run_distributed(train, world, world, preset):
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            if name.startswith("queue."):
                assert value.shape == expected[name].shape
            torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-10, msg=name)
