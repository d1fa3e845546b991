"""ALBEF's pre-training step (ITC with queue and teacher, ITM with hard negatives, MLM with soft
labels) against its published order in plain PyTorch, dropout as published, texts padded to 25
tokens, the longest that ALBEF's pre-training takes. `albef_sdpa` is that step with torch's fused
attention.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.captions import caption_lens
from benchmarks.harness import Inputs, Run
from benchmarks.shapes import SHAPES as _SHAPES
from benchmarks.shapes import AlbefStep
from benchmarks.step.albef_eager import AlbefEager
from benchmarks.step.albef_weights import eager_weights
from benchmarks.step.batches import ALBEF_LEN, eager_batch, make_batch
from benchmarks.step.flops import albef_step_flops, step_bytes
from benchmarks.step.steps import built_once, make_model, num_parameters, own_step, peer_step
from benchmarks.timing import Call
from vlpfast.models import preset_config
from vlpfast.models.config import ModelConfig
from vlpfast.objectives import ObjectivesConfig, PretrainStep

OP = "step_albef"
SHAPES = _SHAPES[OP]
DTYPES = ("fp32", "bf16")
DIRECTIONS = ("step",)
BASELINE = "albef_eager"
TESTS = ("tests/objectives/test_albef_parity.py", "tests/benchmarks/test_step.py")

_MOMENTUM, _ALPHA = 0.995, 0.4


def _config(shape: AlbefStep) -> ModelConfig:
    """Every size with BERT's order and dropout, as published."""
    bert = {"norm": "post", "norm_eps": 1e-12, "dropout": 0.1, "attention_dropout": 0.1}
    config = preset_config("albef", shape.size)
    return replace(config, text=replace(config.text, **bert), fusion=replace(config.fusion, **bert))


def setup(shape: AlbefStep, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The batch of the step and what fills the queue; fp32 weights, and bf16 means autocast."""
    config = _config(shape)
    unit = lambda: F.normalize(torch.randn(shape.queue_size, config.embed_dim, device=device))
    return {
        "shape": shape,
        "config": config,
        "dtype": dtype,
        "batch": make_batch(config, shape.batch, device=device),
        # Images of other batches: no id is one of the batch.
        "queue": (unit(), unit(), torch.arange(shape.queue_size, device=device) + (1 << 40)),
    }


def _own(inputs: Inputs) -> Call:
    batch = inputs["batch"]
    objectives = ObjectivesConfig(
        itc=1.0,
        itm=1.0,
        mlm=1.0,
        momentum=_MOMENTUM,
        queue_size=inputs["shape"].queue_size,
        alpha=_ALPHA,
    )

    def fill(step: PretrainStep) -> None:
        step.queue.push(*inputs["queue"])

    model = make_model(inputs["config"], batch.images.device)
    return own_step(model, objectives, batch, inputs["dtype"], fill)


def _eager(*, sdpa: bool = False) -> Run:
    def build(inputs: Inputs) -> Call:
        config, device = inputs["config"], inputs["batch"].images.device
        albef = AlbefEager(
            config, momentum=_MOMENTUM, queue_size=inputs["shape"].queue_size, sdpa=sdpa
        ).to(device)
        weights = eager_weights(make_model(config, device).state_dict(), config)
        for towers in (albef.student, albef.teacher):
            towers.load_state_dict(weights)
        albef.train().enqueue(*inputs["queue"])
        batch = eager_batch(inputs["batch"], config, ALBEF_LEN)
        return peer_step(albef, lambda: sum(albef(batch, _ALPHA).values()), device, inputs["dtype"])

    return built_once(build)


def impls(device: torch.device) -> dict[str, Run]:
    """Ours, the published order, and that with fused attention."""
    return {
        "vlpfast": built_once(_own),
        "albef_eager": _eager(),
        "albef_sdpa": _eager(sdpa=True),
    }


def bytes(shape: AlbefStep, dtype: torch.dtype, direction: str) -> int:
    """The optimizer's state, the teacher's weights and the queue."""
    config = _config(shape)
    state = step_bytes(num_parameters(config), teacher=True)
    return state + 2 * 4 * shape.queue_size * config.embed_dim


def flops(shape: AlbefStep, direction: str) -> int:
    """Of real tokens, keys and values of an image once, the vocabulary at masked positions."""
    config = _config(shape)
    return round(albef_step_flops(config, caption_lens(shape.batch), shape.queue_size))
