"""MetaLM: a causal decoder that writes after an image and a prompt."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.recipes import clip, coca
from vlpfast.train.config import OptimConfig, RunConfig

OBJECTIVES = ObjectivesConfig(itc=0.0, lm=1.0)


def compact(size: str) -> RunConfig:
    """`tiny` or `small`, for data sets of thousands of pairs on a CPU or one GPU: captions, or
    what `data.tasks` names.
    """
    config = clip.compact(size)
    return replace(
        config,
        name=f"metalm_{size}",
        model=preset_config("metalm", size, context_length=64),
        objectives=OBJECTIVES,
        optim=OptimConfig(lr=5e-4, wd=0.05, beta2=0.98, eps=1e-8, warmup=200, grad_clip_norm=1.0),
        train=replace(config.train, batch_size=128),
    )


def scenes(*, steps: int = 1800) -> RunConfig:
    """`tiny`, 128 wide, 16 patches an image, on the embedded data: writes captions (the shortest,
    of shapes and colours) and answers questions, as it is asked: minutes on one core. Two fifths of
    the samples are captions, as in `pali_scenes`.
    """
    config = compact("tiny")
    model = clip.narrow(preset_config("metalm", "tiny", context_length=64, vocab_size=512))
    tasks = (*("caption",) * 2, *("vqa",) * 3)
    return replace(
        config,
        name="metalm_scenes",
        model=replace(model, vision=replace(model.vision, patch_size=16)),
        data=replace(clip.SCENES_DATA, tasks=tasks, captions=(2,), max_tokens=32),
        optim=replace(config.optim, lr=1e-3, warmup=100),
        train=replace(config.train, batch_size=32, steps=steps, precision="amp_bf16", threads=1),
    )


def base() -> RunConfig:
    """Captions with the schedule of `coca_base`: no code or configuration of MetaLM was published,
    and none of these numbers is its own.
    """
    config = coca.base()
    return replace(
        config,
        name="metalm_base",
        model=preset_config("metalm", "base"),
        objectives=OBJECTIVES,
        data=replace(config.data, vocab_size=50257),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "scenes": scenes,
}
