"""UNITER: words and detected regions through one BERT; one of four objectives a step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlpfast.data.config import DataConfig
from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.recipes import clip
from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig

OBJECTIVES = ObjectivesConfig(
    itc=0.0,
    itm=1.0,
    mlm=1.0,
    wra=0.1,
    mrfr=1.0,
    mrckl=1.0,
    itm_negatives="random",
    mix=(("itm", 2.0), ("mlm", 2.0), ("mrfr", 1.0), ("mrckl", 1.0)),
)


def compact(size: str) -> RunConfig:
    """`tiny` or `small`, for data sets of thousands of pairs whose regions lie in `<path>.regions`;
    set `model.vision.region_dim` and `model.vision.region_classes` to the detector's.
    """
    config = clip.compact(size)
    return replace(
        config,
        name=f"uniter_{size}",
        model=preset_config("uniter", size, context_length=64),
        objectives=OBJECTIVES,
        data=replace(config.data, regions="files"),
        optim=OptimConfig(lr=5e-4, wd=0.05, beta2=0.98, eps=1e-8, warmup=200, grad_clip_norm=5.0),
        train=replace(config.train, batch_size=128),
    )


def scenes(*, steps: int = 1200) -> RunConfig:
    """`tiny`, 128 wide, on the regions of the embedded data: minutes on one core.

    So few steps of the published mix, 15 % of the words masked, leave the model blind.
    """
    config = compact("tiny")
    model = preset_config("uniter", "tiny", context_length=64, vocab_size=512)
    return replace(
        config,
        name="uniter_scenes",
        model=clip.narrow(model),
        objectives=clip.mostly_words(OBJECTIVES, 0.3),
        data=replace(clip.SCENES_IN_FULL, regions="scenes"),
        optim=replace(config.optim, lr=2e-3, warmup=100),
        train=replace(config.train, batch_size=64, steps=steps, precision="amp_bf16", threads=1),
    )


def base() -> RunConfig:
    """The published pre-training on COCO and Visual Genome: 200,000 steps of two times 10,240
    tokens on each of 8 GPUs; 128 pairs are about as many.

    Source: ChenRocks/UNITER config/pretrain-indomain-base-8gpu.json.
    """
    return RunConfig(
        name="uniter_base",
        model=preset_config("uniter", "base"),
        objectives=OBJECTIVES,
        data=DataConfig(path="", regions="files", max_tokens=60, vocab_size=28996),
        optim=OptimConfig(
            lr=5e-5, wd=0.01, beta2=0.98, eps=1e-6, warmup=10_000, grad_clip_norm=5.0
        ),
        train=TrainConfig(batch_size=128, accum_freq=2, steps=200_000, precision="amp_bf16"),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "scenes": scenes,
}
