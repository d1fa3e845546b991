"""CoCa: contrast, and captions by the second half of the same causal text decoder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlpfast.data.config import DataConfig
from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.recipes import clip
from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig

OBJECTIVES = ObjectivesConfig(itc=1.0, lm=2.0)


def compact(size: str) -> RunConfig:
    """`tiny` or `small`, for data sets of thousands of pairs on a CPU or one GPU."""
    config = clip.compact(size)
    return replace(
        config,
        name=f"coca_{size}",
        model=preset_config("coca", size, context_length=64),
        objectives=OBJECTIVES,
        optim=OptimConfig(lr=5e-4, wd=0.05, beta2=0.98, eps=1e-8, warmup=200, grad_clip_norm=1.0),
        train=replace(config.train, batch_size=128),
    )


def scenes(*, steps: int = 700) -> RunConfig:
    """`tiny`, 128 wide, on the embedded data: minutes on one core. It learns to write the shortest
    captions, which name shapes and colours.
    """
    config = compact("tiny")
    model = preset_config("coca", "tiny", context_length=64, vocab_size=512, embed_dim=128)
    return replace(
        config,
        name="coca_scenes",
        model=clip.narrow(model),
        objectives=OBJECTIVES,
        data=replace(clip.SCENES_DATA, captions=(2,)),
        optim=replace(config.optim, lr=1.5e-3, warmup=100),
        train=replace(config.train, batch_size=64, steps=steps, precision="amp_bf16", threads=1),
    )


def base() -> RunConfig:
    """The published pre-training: 500,000 steps of 65,536 pairs, here 256 GPUs of 256.

    Source: Yu et al. 2022, arXiv:2205.01917, section 4.1: the first 2 % of the steps warm up, the
    rate then falls linearly (here by a cosine); Adafactor (here AdamW) with decoupled decay.
    """
    return RunConfig(
        name="coca_base",
        model=preset_config("coca", "base"),
        objectives=OBJECTIVES,
        data=DataConfig(path="", max_tokens=64, vocab_size=64000, crop_scale=(0.9, 1.0)),
        optim=OptimConfig(lr=8e-4, wd=0.01, beta2=0.999, eps=1e-8, warmup=10_000),
        train=TrainConfig(batch_size=256, steps=500_000, precision="amp_bf16"),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "scenes": scenes,
}
