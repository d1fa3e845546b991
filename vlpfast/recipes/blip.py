"""BLIP: contrast and matching as ALBEF, and captions by a decoder tied to the text encoder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlpfast.data.config import DataConfig
from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.recipes import albef, clip
from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig


def compact(size: str) -> RunConfig:
    """`tiny` or `small`, for data sets of thousands of pairs on a CPU or one GPU."""
    config = albef.compact(size)
    return replace(
        config,
        name=f"blip_{size}",
        model=preset_config("blip", size, context_length=64),
        objectives=replace(config.objectives, mlm=0.0, lm=1.0, lm_label_smoothing=0.1),
    )


def scenes(*, steps: int = 700) -> RunConfig:
    """`tiny`, 128 wide, on the embedded data: minutes on one core; the shortest captions, as
    `coca_scenes`, and the teacher of `albef_scenes`.
    """
    config, teacher = compact("tiny"), albef.scenes().objectives
    model = preset_config("blip", "tiny", context_length=64, vocab_size=514)
    return replace(
        config,
        name="blip_scenes",
        model=clip.narrow(model),
        objectives=replace(
            config.objectives, momentum=teacher.momentum, queue_size=teacher.queue_size
        ),
        data=replace(clip.SCENES_DATA, captions=(2,)),
        optim=replace(config.optim, lr=1.5e-3, warmup=100),
        train=replace(config.train, batch_size=32, steps=steps, precision="amp_bf16", threads=1),
    )


def base() -> RunConfig:
    """The published pre-training: 32 GPUs of 75 pairs, 20 epochs of the 14M set.

    Source: Li et al. 2022, arXiv:2201.12086, section 4.1; salesforce/BLIP configs/pretrain.yaml.
    There, the rate falls by a tenth each epoch (here by a cosine), and alpha ramps over two epochs
    (12,000 steps are about two epochs of the 14M set).
    """
    return RunConfig(
        name="blip_base",
        model=preset_config("blip", "base"),
        objectives=ObjectivesConfig(
            itc=1.0,
            itm=1.0,
            lm=1.0,
            lm_label_smoothing=0.1,
            momentum=0.995,
            queue_size=57600,
            alpha=0.4,
            alpha_ramp_steps=12_000,
        ),
        data=DataConfig(path="", max_tokens=30, vocab_size=30522, crop_scale=(0.2, 1.0), hflip=0.5),
        optim=OptimConfig(lr=3e-4, wd=0.05, beta2=0.999, eps=1e-8, warmup=3000, min_lr=1e-6),
        train=TrainConfig(batch_size=75, epochs=20, precision="amp_bf16"),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "scenes": scenes,
}
