"""ALIGN: contrast between a convolutional network and BERT, on noisy pairs, labels smoothed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlpfast.data.config import DataConfig
from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.recipes import clip
from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig

_OBJECTIVES = ObjectivesConfig(itc=1.0, label_smoothing=0.1)


def compact(size: str) -> RunConfig:
    """`tiny` or `small`, for data sets of thousands of pairs on a CPU or one GPU."""
    config = clip.compact(size)
    return replace(
        config,
        name=f"align_{size}",
        model=preset_config("align", size, context_length=64),
        objectives=_OBJECTIVES,
        # From 1 to the few hundredths that it needs, the temperature has a long way in few steps.
        optim=replace(config.optim, lr_multipliers=(("scale", 3.0),)),
    )


def scenes(*, steps: int = 150) -> RunConfig:
    """`tiny`, its text 128 wide, on the embedded data: minutes on one core."""
    config = clip.scenes(compact("tiny"), "align_scenes", steps=steps)
    return replace(config, model=clip.narrow(config.model))


def base() -> RunConfig:
    """EfficientNet-B7 at 289 px and BERT-base on 1,024 devices of 16 pairs; the rate falls linearly
    to 0. BatchNorm takes its statistics over a device's pairs. The optimizer needs NVIDIA apex.

    Source: Jia et al. 2021, arXiv:2102.05918, section 5.1.
    """
    steps, warmup = 1_200_000, 10_000
    return RunConfig(
        name="align_base",
        model=preset_config("align", "base"),
        objectives=_OBJECTIVES,
        data=DataConfig(path="", max_tokens=64, vocab_size=30522, crop_scale=(0.7, 1.0), hflip=0.5),
        optim=OptimConfig(
            optimizer="apex_lamb",
            lr=1e-3,
            wd=1e-5,
            beta2=0.999,
            warmup=warmup,
            lr_scheduler="const-cooldown",
            cooldown=steps - warmup,
        ),
        train=TrainConfig(batch_size=16, steps=steps, precision="amp_bf16"),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "scenes": scenes,
}
