"""FLIP: CLIP with half of the patches dropped before they are embedded."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlpfast.models.presets import preset_config
from vlpfast.recipes import clip
from vlpfast.train.config import OptimConfig, RunConfig


def compact(size: str) -> RunConfig:
    """`tiny` or `small`, for data sets of thousands of pairs on a CPU or one GPU."""
    return replace(
        clip.compact(size),
        name=f"flip_{size}",
        model=preset_config("flip", size, context_length=64),
    )


def scenes(*, steps: int = 250) -> RunConfig:
    """`tiny`, 128 wide, on the embedded data: minutes on one core."""
    config = clip.scenes(compact("tiny"), "flip_scenes", steps=steps)
    return replace(config, model=clip.narrow(config.model))


def base() -> RunConfig:
    """ViT-B/16, half of the patches; the learning rate is 4e-6 for every 256 pairs of the published
    batch of 64k.

    Source: Li et al. 2023, arXiv:2212.00794, appendix; facebookresearch/flip configs.
    """
    config = clip.base()
    return replace(
        config,
        name="flip_base",
        model=preset_config("flip", "base"),
        data=replace(
            config.data, tokenizer="train", max_tokens=32, vocab_size=30522, crop_scale=(0.5, 1.0)
        ),
        optim=OptimConfig(lr=4e-6 * 65536 / 256, wd=0.2, beta2=0.95, eps=1e-8, warmup=2000),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "scenes": scenes,
}
