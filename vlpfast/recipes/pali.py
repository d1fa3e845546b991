"""PaLI: an encoder of image and prompt, a decoder that answers in text."""

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
        name=f"pali_{size}",
        model=preset_config("pali", size, context_length=64),
        objectives=OBJECTIVES,
        optim=OptimConfig(lr=5e-4, wd=0.05, beta2=0.98, eps=1e-8, warmup=200, grad_clip_norm=1.0),
        train=replace(config.train, batch_size=128),
    )


def scenes(*, steps: int = 1800) -> RunConfig:
    """`tiny`, 128 wide, 16 patches an image, on the embedded data: one checkpoint that writes
    captions (the shortest, of shapes and colours), answers questions and judges sentences, as it is
    asked: minutes on one core. A third of the samples are captions, whose many words teach it to
    look.
    """
    config = compact("tiny")
    model = clip.narrow(preset_config("pali", "tiny", context_length=64, vocab_size=512))
    tasks = (*("caption",) * 2, *("vqa",) * 3, "entailment")
    return replace(
        config,
        name="pali_scenes",
        model=replace(model, vision=replace(model.vision, patch_size=16)),
        data=replace(clip.SCENES_DATA, tasks=tasks, captions=(2,)),
        optim=replace(config.optim, lr=1e-3, warmup=100),
        train=replace(config.train, batch_size=32, steps=steps, precision="amp_bf16", threads=1),
    )


def base() -> RunConfig:
    """Captions with the schedule of `coca_base`, and mT5's vocabulary size: no code or
    configuration of PaLI was published, and its own schedule is of models several times larger.
    """
    config = coca.base()
    model = preset_config("pali", "base")
    return replace(
        config,
        name="pali_base",
        model=model,
        objectives=OBJECTIVES,
        data=replace(config.data, vocab_size=model.text.vocab_size),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "scenes": scenes,
}
