"""FLAVA: contrast and matching of pairs, and what is masked predicted, of images, of texts and of
pairs; set `objectives.guide` to the run of a tokenizer (`vqkd_...`) of the same patches.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlpfast.data.config import DataConfig
from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.recipes import clip
from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig

_WORDS = ObjectivesConfig(itc=1.0, itm=1.0, mlm=1.0, mtm=1.0, itm_negatives="random")
OBJECTIVES = replace(_WORDS, mim=1.0, mvm=1.0)


def compact(size: str) -> RunConfig:
    """`tiny` or `small`, for data sets of thousands of pairs on a CPU or one GPU."""
    config = clip.compact(size)
    return replace(
        config,
        name=f"flava_{size}",
        model=preset_config("flava", size, context_length=64),
        objectives=OBJECTIVES,
        optim=OptimConfig(lr=5e-4, wd=0.1, beta2=0.98, eps=1e-8, warmup=200, grad_clip_norm=1.0),
        train=replace(config.train, batch_size=128),
    )


def scenes(*, steps: int = 600) -> RunConfig:
    """`tiny`, 128 wide, on the embedded data, without masked images, and so without a tokenizer:
    minutes on one core.
    """
    config = compact("tiny")
    model = preset_config("flava", "tiny", context_length=64, vocab_size=512, codes=0)
    return replace(
        config,
        name="flava_scenes",
        model=clip.narrow(model),
        objectives=replace(_WORDS, mlm_probability=0.5),
        data=clip.SCENES_IN_FULL,
        optim=replace(config.optim, lr=1.5e-3, warmup=100),
        train=replace(config.train, batch_size=32, steps=steps, precision="amp_bf16", threads=1),
    )


def base() -> RunConfig:
    """The published pre-training, in batches of 8,192 (128 ranks of 64).

    Source: Singh et al. 2022, arXiv:2112.04482, section 3; optimizer, warm-up and steps are those
    of facebookresearch/multimodal examples/flava/native/configs/900m.yaml, the larger model of its
    authors; the batch is from memory, not read there. In FLAVA, images, texts and pairs come from
    sets of their own, here all from the pairs; a pair's masked words are read with its masked
    image, and one of ten pairs has another text.
    """
    return RunConfig(
        name="flava_base",
        model=preset_config("flava", "base"),
        objectives=OBJECTIVES,
        data=DataConfig(path="", max_tokens=77, vocab_size=30522, crop_scale=(0.9, 1.0)),
        optim=OptimConfig(lr=1e-3, wd=0.1, beta2=0.999, eps=1e-8, warmup=10_000),
        train=TrainConfig(batch_size=64, steps=100_000, precision="amp_bf16"),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "scenes": scenes,
}
