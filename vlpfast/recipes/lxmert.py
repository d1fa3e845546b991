"""LXMERT: words and detected regions in two streams with co-attention; matching, masked words and
masked regions from one row of each pair.
"""

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
    mrfr=1.0,
    mrc=1.0,
    itm_negatives="random",
    mrfr_loss="smooth_l1",
    mrc_weighted=True,
    masking="together",
)
# With the attributes of regions and the answers to questions.
ALL = replace(OBJECTIVES, mra=1.0, qa=1.0)


def compact(size: str, *, preset: str = "lxmert", objectives: ObjectivesConfig) -> RunConfig:
    """`tiny` or `small` of `preset`, for data sets of thousands of pairs whose regions lie in
    `<path>.regions`; set `model.vision.region_dim` and `model.vision.region_classes` to the
    detector's.
    """
    config = clip.compact(size)
    return replace(
        config,
        name=f"{preset}_{size}",
        model=preset_config(preset, size, context_length=64),
        objectives=objectives,
        data=replace(config.data, regions="files"),
        optim=OptimConfig(lr=5e-4, wd=0.05, beta2=0.98, eps=1e-8, warmup=200, grad_clip_norm=1.0),
        train=replace(config.train, batch_size=128),
    )


def scenes(
    *,
    preset: str = "lxmert",
    objectives: ObjectivesConfig = OBJECTIVES,
    data: DataConfig = clip.SCENES_DATA,
    steps: int = 500,
) -> RunConfig:
    """`tiny`, 128 wide, on the regions of the embedded data: minutes on one core. Twice the
    published share of words is masked: a masked attribute is what makes the model look at the
    regions.
    """
    config = compact("tiny", preset=preset, objectives=objectives)
    model = preset_config(preset, "tiny", context_length=64, vocab_size=512)
    return replace(
        config,
        name=f"{preset}_scenes",
        model=clip.narrow(model),
        objectives=replace(objectives, mlm_probability=0.3),
        data=replace(data, regions="scenes"),
        optim=replace(config.optim, lr=2e-3, warmup=100),
        train=replace(config.train, batch_size=64, steps=steps, precision="amp_bf16", threads=1),
    )


def scenes_answers(*, steps: int = 1000) -> RunConfig:
    """`scenes` with all published objectives: half of the texts are questions, and regions' sizes
    and textures are told too.
    """
    config = scenes(objectives=ALL, steps=steps)
    vision = replace(config.model.vision, region_attributes=7)
    return replace(
        config,
        name="lxmert_scenes_answers",
        model=replace(config.model, vision=vision),
        data=replace(config.data, tasks=("caption", "vqa"), answers=100),
    )


def base() -> RunConfig:
    """The released pre-training: 12 epochs of COCO and Visual Genome in batches of 256; a twentieth
    of the 430,000 steps warms up, the rate then falls linearly (here by a cosine).

    Half of the texts are questions, of the 9,500 most frequent answers; records hold them as
    `questions`. There, as many are questions as the data sets have.

    Deviation: every hidden region's feature is zero (there 80 %, and 10 % are another region's).

    Source: Tan & Bansal 2019, arXiv:1908.07490, section 3.3; airsplay/lxmert
    run/lxmert_pretrain.bash, src/pretrain/lxmert_pretrain.py.
    """
    return RunConfig(
        name="lxmert_base",
        model=preset_config("lxmert", "base"),
        objectives=ALL,
        data=DataConfig(
            path="",
            regions="files",
            max_tokens=20,
            vocab_size=30522,
            tasks=("caption", "vqa"),
            answers=9500,
        ),
        optim=OptimConfig(
            lr=1e-4, wd=0.01, beta2=0.999, eps=1e-6, warmup=21_500, grad_clip_norm=1.0
        ),
        train=TrainConfig(batch_size=256, epochs=12, precision="amp_bf16"),
    )


RECIPES = {
    "tiny": partial(compact, "tiny", objectives=OBJECTIVES),
    "small": partial(compact, "small", objectives=OBJECTIVES),
    "base": base,
    "scenes": scenes,
    "scenes_answers": scenes_answers,
}
