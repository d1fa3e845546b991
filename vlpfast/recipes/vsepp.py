"""VSE++: the hinge of the hardest negative in the batch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlpfast.data.config import DataConfig
from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.recipes import clip
from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig

_OBJECTIVES = ObjectivesConfig(itc=0.0, hinge=1.0)


def compact(size: str) -> RunConfig:
    """`tiny` or `small`, for data sets of thousands of pairs on a CPU or one GPU."""
    config = clip.compact(size)
    return replace(
        config,
        name=f"vsepp_{size}",
        model=preset_config("vse++", size, context_length=64),
        objectives=replace(_OBJECTIVES, hinge_sum_steps=500),
        # The loss is a sum over the batch, and so is its gradient.
        optim=replace(config.optim, grad_clip_norm=2.0),
        train=replace(config.train, batch_size=128),
    )


def scenes(*, steps: int = 250) -> RunConfig:
    """`tiny` on the embedded data: minutes on one core. All negatives count (VSE0): so early the
    hardest alone draw all embeddings to one point.
    """
    config = clip.scenes(compact("tiny"), "vsepp_scenes", steps=steps)
    return replace(
        config,
        objectives=replace(_OBJECTIVES, hinge_hardest=False),
        train=replace(config.train, batch_size=32),
    )


def base() -> RunConfig:
    """VGG-19 and GRU, 30 epochs of 128 pairs. Where VSE++ divides the rate by ten after half of the
    epochs, it falls by a cosine here.

    Source: Faghri et al. 2018, arXiv:1707.05612, section 4.1; fartashf/vsepp train.py.
    """
    return RunConfig(
        name="vsepp_base",
        model=preset_config("vse++", "base"),
        objectives=_OBJECTIVES,
        data=DataConfig(
            path="", max_tokens=64, vocab_size=10_000, crop_scale=(0.6, 1.0), hflip=0.5
        ),
        optim=OptimConfig(lr=2e-4, wd=0.0, beta2=0.999, eps=1e-8, grad_clip_norm=2.0),
        train=TrainConfig(batch_size=128, epochs=30, precision="fp32"),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "scenes": scenes,
}
