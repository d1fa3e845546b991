"""ViLT: word and patch embeddings through one stack; matching, alignment and masked words."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlpfast.data.config import DataConfig
from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.recipes import clip, downstream
from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig

OBJECTIVES = ObjectivesConfig(
    itc=0.0,
    itm=1.0,
    mlm=1.0,
    wra=0.1,
    itm_negatives="random",
    wra_tokens="inner",
    mlm_whole_word=True,
)


def compact(size: str) -> RunConfig:
    """`tiny` or `small`, for data sets of thousands of pairs on a CPU or one GPU."""
    config = clip.compact(size)
    return replace(
        config,
        name=f"vilt_{size}",
        model=preset_config("vilt", size, context_length=64),
        objectives=OBJECTIVES,
        optim=OptimConfig(lr=5e-4, wd=0.05, beta2=0.98, eps=1e-8, warmup=200, grad_clip_norm=1.0),
        train=replace(config.train, batch_size=128),
    )


def scenes(*, steps: int = 600) -> RunConfig:
    """`tiny`, 128 wide, on the embedded data: minutes on one core."""
    config = compact("tiny")
    model = preset_config("vilt", "tiny", context_length=64, vocab_size=512)
    return replace(
        config,
        name="vilt_scenes",
        model=clip.narrow(model),
        objectives=clip.mostly_words(OBJECTIVES, 0.5),
        data=clip.SCENES_IN_FULL,
        optim=replace(config.optim, lr=1.5e-3, warmup=100),
        train=replace(config.train, batch_size=32, steps=steps, precision="amp_bf16", threads=1),
    )


def base() -> RunConfig:
    """The published pre-training: 200,000 steps of 4096 pairs on 64 GPUs.

    Source: Kim et al. 2021, arXiv:2102.03334, section 4.2; dandelin/ViLT vilt/config.py: a tenth of
    the steps warms up, the rate then falls linearly (here by a cosine). Images keep their aspect
    ratio, the shorter side 384 pixels and the longer up to 640.
    """
    return RunConfig(
        name="vilt_base",
        model=preset_config("vilt", "base"),
        objectives=OBJECTIVES,
        data=DataConfig(
            path="", max_tokens=40, vocab_size=30522, crop_scale=(1.0, 1.0), max_aspect=1333 / 800
        ),
        optim=OptimConfig(lr=1e-4, wd=0.01, beta2=0.98, eps=1e-8, warmup=20_000),
        train=TrainConfig(batch_size=64, steps=200_000, precision="amp_bf16"),
    )


def base_vqa() -> RunConfig:
    """The published fine-tuning for VQA v2: 10 epochs in batches of 256, the head at ten times the
    rate, a tenth of the steps to warm up (here of 650,000 questions). Words are not augmented, nor
    images (there by RandAugment).

    Source: Kim et al. 2021, arXiv:2102.03334, section 4.3; dandelin/ViLT vilt/config.py.
    """
    train = {"epochs": 10, "batch_size": 32}
    return downstream.finetune(base(), "vqa", lr=1e-4, head=10.0, warmup=2500, **train)


def base_nlvr() -> RunConfig:
    """The published fine-tuning for NLVR2: 10 epochs in batches of 128, otherwise as `base_vqa`.

    Deviation: images are squares, and both have the same embedding of what is an image.
    """
    train = {"epochs": 10, "batch_size": 16}
    config = downstream.finetune(base(), "nlvr", lr=1e-4, head=10.0, warmup=675, **train)
    return replace(config, data=replace(config.data, max_aspect=1.0, eval_crop="squash"))


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "base_vqa": base_vqa,
    "base_nlvr": base_nlvr,
    "scenes": scenes,
}
