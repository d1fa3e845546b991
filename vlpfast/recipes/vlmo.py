"""VLMo: one stack with experts, in three stages: images, texts, pairs. A stage starts from the run
before it (`train.init`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlpfast.data.config import DataConfig
from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.recipes import clip
from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig

OBJECTIVES = ObjectivesConfig(itc=1.0, itm=1.0, mlm=0.25, mlm_whole_word=True)
TEXTS = ObjectivesConfig(itc=0.0, mtm=1.0, mlm_whole_word=True)
# What stage 2 leaves as stage 1 made it, and what it has no data for: all but the embeddings of
# words and their displacements, the experts of text, and the token head.
FROZEN = (
    "vision.*",
    "fusion.modality",
    "fusion.norm.*",
    "fusion.blocks.*.attention.*",
    "fusion.blocks.*.norm1.*",
    "fusion.blocks.*.image.*",
    "fusion.blocks.*.joint.*",
    "*_projection.*",
    "joint_heads.*",
    "pooler.*",
    "match_head.*",
    "scale",
)


def compact(size: str) -> RunConfig:
    """The last stage in `tiny` or `small`, for thousands of pairs on a CPU or one GPU."""
    config = clip.compact(size)
    return replace(
        config,
        name=f"vlmo_{size}",
        model=preset_config("vlmo", size, context_length=64, codes=0),
        objectives=OBJECTIVES,
        optim=OptimConfig(lr=5e-4, wd=0.05, beta2=0.98, eps=1e-8, warmup=200, grad_clip_norm=1.0),
        train=replace(config.train, batch_size=128),
    )


def scenes(*, steps: int = 500) -> RunConfig:
    """`tiny`, 128 wide, on the embedded data: minutes on one core."""
    config = compact("tiny")
    model = preset_config("vlmo", "tiny", context_length=64, vocab_size=512, codes=0)
    return replace(
        config,
        name="vlmo_scenes",
        model=clip.narrow(model),
        objectives=replace(OBJECTIVES, mlm=1.0, mlm_probability=0.3),
        data=clip.SCENES_DATA,
        optim=replace(config.optim, lr=1.5e-3, warmup=100),
        train=replace(config.train, batch_size=32, steps=steps, precision="amp_bf16", threads=1),
    )


def texts(config: RunConfig) -> RunConfig:
    """The second stage of `config`: masked texts alone, all but the experts of text frozen.

    Source: Bao et al. 2022, arXiv:2111.02358, section 3.4; microsoft/unilm's code trains the
    attention too.
    """
    return replace(
        config,
        name=f"{config.name}_texts",
        objectives=TEXTS,
        train=replace(config.train, freeze=FROZEN),
    )


def images(config: RunConfig) -> RunConfig:
    """The first stage of `config`: masked images alone, as BEiT, with the codes of
    `objectives.guide`.
    """
    return replace(
        config,
        name=f"{config.name}_images",
        model=replace(config.model, codes=preset_config("vlmo", config.model.size).codes),
        objectives=ObjectivesConfig(itc=0.0, mim=1.0),
    )


def base() -> RunConfig:
    """The published last stage: 200,000 steps of 1,024 pairs.

    Source: microsoft/unilm vlmo/config.py `task_mlm_itm_itc_base`, `step200k` and vlmo/README.md.
    """
    model = preset_config("vlmo", "base", codes=0)
    return RunConfig(
        name="vlmo_base",
        model=replace(model, fusion=replace(model.fusion, drop_path_rate=0.1)),
        objectives=replace(OBJECTIVES, itm_negatives="hard-global"),
        data=DataConfig(path="", max_tokens=40, vocab_size=30522, crop_scale=(0.5, 1.0)),
        optim=OptimConfig(
            lr=2e-4, wd=0.01, beta2=0.98, eps=1e-8, warmup=2_500, no_decay=("relative_bias",)
        ),
        train=TrainConfig(batch_size=128, steps=200_000, precision="amp_bf16"),
    )


def base_texts() -> RunConfig:
    """The published second stage: as `texts`, of up to 196 tokens, 500,000 steps.

    Source: as `base`, `task_textmlm_base`, `step500k`.
    """
    config = texts(base())
    return replace(
        config,
        data=replace(config.data, max_tokens=196),
        train=replace(config.train, steps=500_000),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "base_images": lambda: images(base()),
    "base_texts": base_texts,
    "scenes": scenes,
    "scenes_images": lambda: images(scenes()),
    "scenes_texts": lambda: texts(scenes()),
}
