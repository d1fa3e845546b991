"""X-LXMERT: words and the cells of a grid in two streams; matching, masked words and hidden cells'
codes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.recipes import clip, lxmert
from vlpfast.train.config import RunConfig

OBJECTIVES = ObjectivesConfig(
    itc=0.0, itm=1.0, mlm=1.0, mvm=1.0, itm_negatives="random", mim_probability=0.5
)
# As published, a share of the cells that is drawn for each image.
EVEN = replace(OBJECTIVES, mim_mask="even")


def compact(size: str) -> RunConfig:
    """`tiny` or `small`: set `objectives.guide` to a tokenizer's run (`kmeans_tiny`, `vqkd_tiny`,
    ...) of as many patches.
    """
    config = lxmert.compact(size, preset="x-lxmert", objectives=OBJECTIVES)
    return replace(config, name=f"x_lxmert_{size}", data=replace(config.data, regions=""))


def scenes(*, steps: int = 800) -> RunConfig:
    """`tiny`, 128 wide, 4 x 4 cells of images of 32 px, on the embedded data: minutes on one core.
    Set `objectives.guide` to a run of `kmeans_scenes`.
    """
    config = lxmert.scenes(preset="x-lxmert", objectives=OBJECTIVES, steps=steps)
    return replace(
        config,
        name="x_lxmert_scenes",
        model=replace(config.model, image_size=32),
        objectives=clip.mostly_words(OBJECTIVES, 0.5),
        data=clip.SCENES_IN_FULL,
        optim=replace(config.optim, lr=1e-3),
        train=replace(config.train, batch_size=32),
    )


def base() -> RunConfig:
    """LXMERT's pre-training with hidden cells in the place of regions, whose codes are those of
    `objectives.guide`, a run of `kmeans_base`; 20 epochs.

    Deviation: words, cells and matching are trained in every step, in rows of their own.

    Source: Cho et al. 2020, arXiv:2009.11278, section 4.3; allenai/x-lxmert
    x-lxmert/scripts/pretrain.bash; for the rest see `lxmert.base`.
    """
    config = lxmert.base()
    return replace(
        config,
        name="x_lxmert_base",
        model=lxmert.preset_config("x-lxmert", "base"),
        objectives=EVEN,
        data=replace(config.data, regions="", tasks=(), answers=0),
        train=replace(config.train, epochs=20),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "scenes": scenes,
}
