"""Pixel-BERT: words and a CNN's grid through one BERT; matching and masked words."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlpfast.data.config import DataConfig
from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.recipes import clip
from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig

OBJECTIVES = ObjectivesConfig(itc=0.0, itm=1.0, mlm=1.0, itm_negatives="random")


def compact(size: str) -> RunConfig:
    """`tiny` or `small`, for data sets of thousands of pairs on a CPU or one GPU."""
    config = clip.compact(size)
    return replace(
        config,
        name=f"pixel_bert_{size}",
        model=preset_config("pixel-bert", size, context_length=64),
        objectives=OBJECTIVES,
        optim=OptimConfig(lr=5e-4, wd=0.05, beta2=0.98, eps=1e-8, warmup=200, grad_clip_norm=1.0),
        train=replace(config.train, batch_size=128),
    )


def scenes(*, steps: int = 450) -> RunConfig:
    """`tiny`, 128 wide, on the embedded data: minutes on one core."""
    config = compact("tiny")
    model = preset_config("pixel-bert", "tiny", context_length=64, vocab_size=512)
    return replace(
        config,
        name="pixel_bert_scenes",
        model=clip.narrow(model),
        objectives=clip.mostly_words(OBJECTIVES, 0.5),
        data=clip.SCENES_IN_FULL,
        optim=replace(config.optim, lr=1.5e-3, warmup=100),
        train=replace(config.train, batch_size=32, steps=steps, precision="amp_bf16", threads=1),
    )


def base() -> RunConfig:
    """The published sizes, 40 epochs of COCO and Visual Genome.

    The paper trains the CNN by SGD and the transformer by AdamW, each at its rate; here one AdamW
    trains both.

    Source: Huang et al. 2020, arXiv:2004.00849, section 4.1.
    """
    return RunConfig(
        name="pixel_bert_base",
        model=preset_config("pixel-bert", "base"),
        objectives=OBJECTIVES,
        data=DataConfig(path="", max_tokens=40, vocab_size=30522, crop_scale=(0.9, 1.0)),
        optim=OptimConfig(lr=1e-4, wd=0.01, beta2=0.999, eps=1e-8, warmup=2000),
        train=TrainConfig(batch_size=64, epochs=40, precision="amp_bf16"),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "scenes": scenes,
}
