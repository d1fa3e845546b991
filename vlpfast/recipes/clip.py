"""CLIP: contrast between two towers."""

from __future__ import annotations

from functools import partial

from vlpfast.data.config import DataConfig
from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig


def compact(size: str) -> RunConfig:
    """`tiny` or `small`, for data sets of thousands of pairs on a CPU or one GPU."""
    return RunConfig(
        name=f"clip_{size}",
        model=preset_config("clip", size, context_length=64),
        objectives=ObjectivesConfig(itc=1.0),
        data=DataConfig(path="", max_tokens=32, vocab_size=4096, crop_scale=(0.6, 1.0)),
        optim=OptimConfig(lr=1e-3, wd=0.2, beta2=0.98, eps=1e-6, warmup=200, grad_clip_norm=1.0),
        train=TrainConfig(
            batch_size=256, steps=3000, precision="fp32", log_every_n_steps=50, save_every=500
        ),
    )


def base() -> RunConfig:
    """ViT-B/32 with the published schedule.

    Source: Radford et al. 2021, arXiv:2103.00020, tables 18 and 19.
    """
    return RunConfig(
        name="clip_base",
        model=preset_config("clip", "base"),
        objectives=ObjectivesConfig(itc=1.0),
        data=DataConfig(
            path="", tokenizer="clip", max_tokens=77, vocab_size=49408, crop_scale=(0.9, 1.0)
        ),
        optim=OptimConfig(lr=5e-4, wd=0.2, beta2=0.98, eps=1e-6, warmup=2000),
        train=TrainConfig(batch_size=1024, epochs=32, precision="amp_bf16"),
    )


RECIPES = {"tiny": partial(compact, "tiny"), "small": partial(compact, "small"), "base": base}
