"""Unified-IO: words, places and images as tokens of one vocabulary. Runs that write images (task
"image") need the run of a tokenizer (`vqkd_...`) in `objectives.guide`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.recipes import clip, coca
from vlpfast.train.config import OptimConfig, RunConfig

OBJECTIVES = ObjectivesConfig(itc=0.0, lm=1.0)
_TASKS = ("caption", "vqa", "entailment", "box", "region", "image")


def compact(size: str) -> RunConfig:
    """`tiny` or `small`, for data sets of thousands of pairs on a CPU or one GPU: captions, or
    what `data.tasks` names.
    """
    config = clip.compact(size)
    return replace(
        config,
        name=f"unified_io_{size}",
        model=preset_config("unified-io", size),
        objectives=OBJECTIVES,
        data=replace(config.data, tasks=("caption",), locations=1000, crop_scale=(1.0, 1.0)),
        optim=OptimConfig(lr=5e-4, wd=0.05, beta2=0.98, eps=1e-8, warmup=200, grad_clip_norm=1.0),
        train=replace(config.train, batch_size=128),
    )


def scenes_words(*, steps: int = 3400) -> RunConfig:
    """`tiny`, 128 wide, 2 + 2 blocks, 16 patches an image, on the embedded data: minutes on one
    core. One checkpoint says where an object is, what is somewhere, writes captions (the shortest,
    of shapes and colours, from which the image is first learned, and those in full), answers
    questions and judges sentences, as it is asked.
    """
    config, model = compact("tiny"), clip.narrow(preset_config("unified-io", "tiny"))
    return replace(
        config,
        name="unified_io_scenes_words",
        model=replace(
            model,
            vision=replace(model.vision, patch_size=16),
            fusion=replace(model.fusion, depth=2),
        ),
        data=replace(
            clip.SCENES_DATA,
            tasks=(*("caption",) * 2, *("box",) * 6, "vqa", "entailment", "region"),
            # Two bins a step of the grid on which the scenes' objects lie.
            locations=64,
            captions=(0, 2),
        ),
        optim=replace(config.optim, lr=1e-3, warmup=100),
        train=replace(config.train, batch_size=32, steps=steps, precision="amp_bf16", threads=1),
    )


def scenes(*, steps: int = 3400) -> RunConfig:
    """The same, and writes images: the codes of a tokenizer (`kmeans_scenes`), from the caption."""
    config = scenes_words(steps=steps)
    tasks = (*config.data.tasks, *("image",) * 2)
    return replace(config, name="unified_io_scenes", data=replace(config.data, tasks=tasks))


def base() -> RunConfig:
    """All tasks alike, of records that have their fields (`data.prompts`), whole images squashed to
    384 px. The tokenizer's run is to be set: its codes, not 16,384 of a VQ-GAN, are written.

    No training code of Unified-IO was published. Dropout and the steps of the warm-up are those of
    its successor's; that has Adafactor with a rate relative to the weights, so that rate, decay,
    batch and length are `coca_base`'s.

    Source: allenai/unified-io-inference uio/configs.py and uio/utils.py (sizes, 1000 bins);
    allenai/unified-io-2 t5x/configs/runs/multitask.gin (dropout 0.1, warm-up 10,000).
    """
    config, model = coca.base(), preset_config("unified-io", "base")
    return replace(
        config,
        name="unified_io_base",
        model=replace(model, fusion=replace(model.fusion, dropout=0.1)),
        objectives=OBJECTIVES,
        data=replace(
            config.data,
            tasks=_TASKS,
            locations=1000,
            vocab_size=32_000,
            max_tokens=256,
            crop_scale=(1.0, 1.0),
            eval_crop="squash",
        ),
        optim=replace(config.optim, warmup=10_000),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "scenes": scenes,
    "scenes_words": scenes_words,
}
