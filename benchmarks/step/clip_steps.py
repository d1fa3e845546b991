"""The contrastive step of bench_clip and bench_flip: ours, and open_clip's with its own model, its
loss and its patch dropping. open_clip pads every text to 77 tokens.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import torch

from benchmarks.captions import caption_lens
from benchmarks.harness import Inputs, Run
from benchmarks.shapes import ClipStep
from benchmarks.step.batches import CLIP_LEN, make_batch, normalised, padded_ids
from benchmarks.step.flops import clip_step_flops, step_bytes
from benchmarks.step.open_clip import open_clip_module, open_clip_weights
from benchmarks.step.steps import built_once, make_model, num_parameters, own_step, peer_step
from benchmarks.timing import Call
from vlpfast.models import preset_config
from vlpfast.models.config import ModelConfig
from vlpfast.objectives import ObjectivesConfig


def clip_config(shape: ClipStep) -> ModelConfig:
    """The model of a shape."""
    config = preset_config("clip", shape.size)
    vision = replace(config.vision, patch_size=shape.patch_size, patch_dropout=shape.patch_dropout)
    return replace(config, vision=vision)


def setup(shape: ClipStep, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The batch of the step; fp32 weights, and bf16 means autocast."""
    config = clip_config(shape)
    batch = make_batch(config, shape.batch, device=device)
    return {"config": config, "dtype": dtype, "batch": batch}


def own() -> Run:
    """`PretrainStep` in the training loop; drops patches where the shape says so."""

    def build(inputs: Inputs) -> Call:
        batch = inputs["batch"]
        model = make_model(inputs["config"], batch.images.device)
        return own_step(model, ObjectivesConfig(itc=1.0), batch, inputs["dtype"])

    return built_once(build)


def open_clip(*, dropped: bool = False) -> Run:
    """open_clip's step; `dropped`: with the shape's patch dropout, else on whole images."""

    def build(inputs: Inputs) -> Call:
        config, batch = inputs["config"], inputs["batch"]
        device = batch.images.device
        dropout = config.vision.patch_dropout if dropped else 0.0
        module = open_clip_module(config, patch_dropout=dropout).to(device).train()
        ours = make_model(config, device)
        module.load_state_dict(open_clip_weights(ours.state_dict()))
        loss = importlib.import_module("tests._peers").open_clip_losses().ClipLoss()
        images, texts = normalised(batch.images, config), padded_ids(batch.text, CLIP_LEN)

        @torch.no_grad()
        def clamp() -> None:
            module.logit_scale.clamp_(0, math.log(100))

        return peer_step(
            module, lambda: loss(*module(images, texts)), device, inputs["dtype"], clamp
        )

    return built_once(build)


def bytes(shape: ClipStep, dtype: torch.dtype, direction: str) -> int:
    """The optimizer's state."""
    return step_bytes(num_parameters(clip_config(shape)), teacher=False)


def flops(shape: ClipStep, direction: str) -> int:
    """Of kept patches and real tokens."""
    config = clip_config(shape)
    num_kept = max(1, round(config.num_patches * (1 - shape.patch_dropout)))
    return round(clip_step_flops(config, caption_lens(shape.batch), num_kept))
