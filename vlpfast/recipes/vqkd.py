"""VQ-KD: a tokenizer of patches, learned from a teacher's features; set `objectives.guide` to the
run of a teacher, any with a vision transformer over as many patches.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlpfast.data.config import DataConfig
from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.recipes import clip
from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig

_OBJECTIVES = ObjectivesConfig(itc=0.0, vqkd=1.0)


def compact(size: str) -> RunConfig:
    """`tiny` or `small`, for data sets of thousands of pairs on a CPU or one GPU."""
    config = clip.compact(size)
    return replace(
        config,
        name=f"vqkd_{size}",
        model=preset_config("vqkd", size),
        objectives=_OBJECTIVES,
        optim=OptimConfig(lr=5e-4, wd=1e-4, beta2=0.99, eps=1e-8, warmup=100),
        train=replace(config.train, batch_size=128),
    )


def scenes(*, steps: int = 300) -> RunConfig:
    """`tiny`, 128 wide, on the embedded data: minutes on one core. In so few steps the codes'
    moving averages have to be short.
    """
    config = compact("tiny")
    model = config.model
    return replace(
        config,
        name="vqkd_scenes",
        model=replace(
            model,
            vision=replace(model.vision, dim=128, heads=4, depth=2),
            codebook=replace(model.codebook, decay=0.9, revive_below=0.1),
        ),
        data=clip.SCENES_DATA,
        optim=replace(config.optim, lr=1e-3, warmup=50),
        train=replace(config.train, batch_size=32, steps=steps, precision="amp_bf16", threads=1),
    )


def base() -> RunConfig:
    """The published tokenizer of CLIP ViT-B/16's features: 100 epochs of ImageNet-1k, 8 GPUs of 64
    images. The teacher is then a `clip_base` run with patches of 16 pixels.

    Source: microsoft/unilm beit2/TOKENIZER.md (rate 5e-5 per 128 images, run_vqkd_training.py).
    """
    return RunConfig(
        name="vqkd_base",
        model=preset_config("vqkd", "base"),
        objectives=_OBJECTIVES,
        data=DataConfig(path="", crop_scale=(0.08, 1.0), hflip=0.5),
        optim=OptimConfig(lr=2e-4, wd=1e-4, beta2=0.99, eps=1e-8, warmup=25_000, min_lr=1e-5),
        train=TrainConfig(batch_size=64, epochs=100, precision="amp_bf16"),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "scenes": scenes,
}
