"""A training step as a call without arguments, ours and a peer's: forward, backward, optimizer,
and what follows it (teacher, queue, clamped scale), on one batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import Inputs, Run
from benchmarks.timing import Call
from vlpfast.data.batch import Batch
from vlpfast.models import VLPModel
from vlpfast.models.config import ModelConfig
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.train.config import OptimConfig, TrainConfig
from vlpfast.train.distributed import World
from vlpfast.train.loop import Trainer
from vlpfast.train.types import Run as TrainRun

# Small, so that hundreds of steps on one batch stay finite.
_LR, _WD = 1e-5, 0.02


def make_model(config: ModelConfig, device: torch.device) -> VLPModel:
    """The model of which every implementation takes the weights."""
    torch.manual_seed(0)
    return VLPModel(config).to(device)


@cache
def num_parameters(config: ModelConfig) -> int:
    """Parameters of the model; no memory is taken."""
    with torch.device("meta"):
        return sum(p.numel() for p in VLPModel(config).parameters())


def own_step(
    model: VLPModel,
    objectives: ObjectivesConfig,
    batch: Batch,
    dtype: torch.dtype,
    prepare: Callable[[PretrainStep], object] = lambda step: None,
) -> Call:
    """The step of the library's own training loop, with all that it does: guard against NaN, logged
    values, gradient norm.

    Args:
        prepare: what is done to the step module first (filling its queue).
    """
    device = batch.images.device
    step = PretrainStep(model, objectives)
    trainer = Trainer(
        step,
        open_loader=lambda micro_batch: None,
        optim=OptimConfig(lr=_LR, wd=_WD, lr_scheduler="const"),
        config=TrainConfig(
            batch_size=len(batch),
            steps=1 << 30,
            precision="amp_bf16" if dtype == torch.bfloat16 else "fp32",
        ),
        run=TrainRun("step", Path(), len(batch), {}, {}),
        world=World(0, 1, device),
    )
    prepare(step)
    batches = itertools.repeat(batch)
    return lambda: trainer.take_step(step, batches)


def peer_step(
    module: nn.Module,
    loss: Callable[[], Tensor],
    device: torch.device,
    dtype: torch.dtype,
    after: Callable[[], object] = lambda: None,
) -> Call:
    """The step of a peer's training script, under the same autocast.

    Args:
        module: trained; vectors and scalars without weight decay.
        loss: forward of the batch.
        after: what follows the optimizer.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": _WD},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=_LR)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            total = loss()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        after()
        return total.detach()

    return step


def built_once(build: Callable[[Inputs], Call]) -> Run:
    """Builds the step at its first call: each implementation holds its own weights and moments, and
    those of one that does not run are never made.
    """

    def run(inputs: Inputs) -> object:
        if "step" not in inputs:
            inputs["step"] = build(inputs)
        return inputs["step"]()

    return run
