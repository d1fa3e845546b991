"""PretrainStep against ALBEF's step in plain PyTorch (benchmarks/step/albef_eager.py): losses,
gradients, teacher and queue over several steps, on the negatives that PretrainStep drew.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.step.albef_eager import AlbefEager
from benchmarks.step.albef_weights import eager_weights
from benchmarks.step.batches import eager_batch
from tests._batches import make_batch
from vlpfast.data.batch import Batch
from vlpfast.models import VLPModel, preset_config
from vlpfast.models.config import ModelConfig
from vlpfast.objectives import ObjectivesConfig, PretrainStep, contrast
from vlpfast.objectives.step import StepOutput

OBJECTIVES = ObjectivesConfig(itc=1.0, itm=1.0, mlm=1.0, momentum=0.9, queue_size=8, alpha=0.4)
# The fp32 bound is what the project promises; fp64 shows that nothing hides below it.
TOLERANCE = {torch.float64: (1e-9, 1e-12), torch.float32: (1e-5, 1e-6)}


def small_config(norm: str) -> ModelConfig:
    """Two layers a stack. "post" is the published order of text and fusion layers (BERT's)."""
    config = preset_config("albef", "tiny", vocab_size=50, image_size=16)
    width = {"dim": 96, "heads": 4, "depth": 2}
    order = {**width, "norm": norm, "norm_eps": 1e-12 if norm == "post" else 1e-6}
    return replace(
        config,
        vision=replace(config.vision, **width),
        text=replace(config.text, **order),
        fusion=replace(config.fusion, **order),
    )


def pair(config: ModelConfig, dtype: torch.dtype) -> tuple[PretrainStep, AlbefEager]:
    """Our step and the eager one with the same weights, biases and norms moved off 0 and 1."""
    torch.manual_seed(0)
    model = VLPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    step = PretrainStep(model, OBJECTIVES).to(dtype).train()
    eager = AlbefEager(config, momentum=OBJECTIVES.momentum, queue_size=8).to(dtype).train()
    for towers in (eager.student, eager.teacher):
        towers.load_state_dict(eager_weights(step.model.state_dict(), config))
    return step, eager


def run_step(step: PretrainStep, batch: Batch, number: int) -> tuple[StepOutput, tuple]:
    """The step's output and the negatives it drew."""
    drawn, itc = [], contrast.itc

    def recorded(*args: object) -> object:
        drawn.append(itc(*args))
        return drawn[-1]

    with mock.patch.object(contrast, "itc", recorded):
        out = step(batch, seed=number, step=number)
    return out, drawn[0][1:]


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Every tensor of `theirs`, by name; absolute errors count against the tensor's largest."""
    assert ours.keys() == theirs.keys()
    rtol, atol = TOLERANCE[dtype]
    for name, expected in theirs.items():
        torch.testing.assert_close(
            ours[name],
            expected,
            rtol=rtol,
            atol=max(rtol * float(expected.detach().abs().max()), atol),
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_equals_the_published_order(dtype: torch.dtype, norm: str) -> None:
    """Three steps of SGD; batches of 5 wrap a queue of 8, and two pairs share an image."""
    config = small_config(norm)
    step, eager = pair(config, dtype)
    for number in range(3):
        batch = make_batch(5, seed=number)
        out, negatives = run_step(step, batch, number)
        losses = {name: total / count for name, (total, count) in out.losses.items()}
        expected = eager(eager_batch(batch, config, dtype=dtype), 0.4, negatives)
        assert_same(losses, expected, dtype)

        step.model.zero_grad()
        eager.student.zero_grad()
        sum(losses.values()).backward()
        sum(expected.values()).backward()
        gradients = {name: p.grad for name, p in step.model.named_parameters()}
        theirs = {name: p.grad for name, p in eager.student.named_parameters()}
        assert_same(eager_weights(gradients, config), theirs, dtype)

        with torch.no_grad():
            for parameter in (*step.model.parameters(), *eager.student.parameters()):
                parameter -= 0.1 * parameter.grad
        step.finish_step()
    eager.momentum_update()  # ours comes after the update of weights, theirs at the next forward
    teacher = eager_weights(step.teacher.model.state_dict(), config)
    assert_same(teacher, eager.teacher.state_dict(), dtype)
    queue = {"image": step.queue.image.T, "text": step.queue.text.T}
    assert_same(queue, {"image": eager.image_queue, "text": eager.text_queue}, dtype)
    assert torch.equal(step.queue.ids, eager.id_queue)


def test_a_wrong_order_is_seen() -> None:
    """The comparison above fails where one row of negatives is another's."""
    config = small_config("post")
    step, eager = pair(config, torch.float64)
    batch = make_batch(5)
    out, (hard_text, hard_image) = run_step(step, batch, 0)
    images = eager_batch(batch, config, dtype=torch.float64)
    swapped = eager(images, 0.4, (hard_text, hard_image.roll(1)))
    loss, count = out.losses["itm"]
    assert (loss / count - swapped["itm"]).abs().item() > 1e-6
