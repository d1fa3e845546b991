"""BEiT v2: codes of hidden patches, from images alone; set `objectives.guide` to the run of a
tokenizer (`vqkd_...`) of the same patches.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlpfast.data.config import DataConfig
from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.recipes import clip
from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig

_OBJECTIVES = ObjectivesConfig(itc=0.0, mim=1.0)


def compact(size: str) -> RunConfig:
    """`tiny` or `small`, for data sets of thousands of pairs on a CPU or one GPU."""
    config = clip.compact(size)
    return replace(
        config,
        name=f"beit2_{size}",
        model=preset_config("beit2", size),
        objectives=_OBJECTIVES,
        optim=OptimConfig(lr=1e-3, wd=0.05, beta2=0.98, eps=1e-8, warmup=200, grad_clip_norm=3.0),
        train=replace(config.train, batch_size=128),
    )


def scenes(*, steps: int = 250) -> RunConfig:
    """`tiny`, 128 wide, on the embedded data: minutes on one core."""
    config = compact("tiny")
    model = config.model
    return replace(
        config,
        name="beit2_scenes",
        model=replace(model, vision=replace(model.vision, dim=128, heads=4)),
        data=clip.SCENES_DATA,
        optim=replace(config.optim, lr=2e-3, warmup=50),
        train=replace(config.train, batch_size=32, steps=steps, precision="amp_bf16", threads=1),
    )


def base() -> RunConfig:
    """The published pre-training on ImageNet-1k, the short one: 300 epochs, 16 GPUs of 128 images,
    75 of 196 patches hidden.

    Source: microsoft/unilm beit2/PRETRAINING.md, which has no stochastic depth in the short one;
    for decay and least rate run_beitv2_pretraining.py.
    """
    return RunConfig(
        name="beit2_base",
        model=preset_config("beit2", "base"),
        objectives=_OBJECTIVES,
        data=DataConfig(path="", crop_scale=(0.2, 1.0), hflip=0.5, color_jitter=0.4),
        optim=OptimConfig(
            lr=1.5e-3,
            wd=0.05,
            beta2=0.98,
            eps=1e-8,
            warmup=6_250,
            min_lr=1e-5,
            grad_clip_norm=3.0,
        ),
        train=TrainConfig(batch_size=128, epochs=300, precision="amp_bf16"),
    )


def base_long() -> RunConfig:
    """The published long pre-training: 1,600 epochs, with stochastic depth. Source: as `base`."""
    config = base()
    vision = replace(config.model.vision, drop_path_rate=0.1)
    return replace(
        config,
        name="beit2_base_long",
        model=replace(config.model, vision=vision),
        optim=replace(config.optim, beta2=0.999),
        train=replace(config.train, epochs=1600),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "base_long": base_long,
    "scenes": scenes,
}
