"""K-means: codes of a CNN's cells, for `x-lxmert`; the CNN learns by contrast with texts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlpfast.data.config import DataConfig
from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.recipes import align, clip
from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig

OBJECTIVES = ObjectivesConfig(itc=1.0, kmeans=1.0, label_smoothing=0.1)


def compact(size: str) -> RunConfig:
    """`tiny` or `small`: the centres follow a CNN that learns along."""
    config = align.compact(size)
    return replace(
        config,
        name=f"kmeans_{size}",
        model=preset_config("kmeans", size, context_length=64),
        objectives=OBJECTIVES,
    )


def scenes(*, steps: int = 400) -> RunConfig:
    """`tiny` on the embedded data, as many cells as `x_lxmert_scenes` has (4 x 4 of images of
    32 px): minutes on one core.
    """
    config = compact("tiny")
    model = preset_config("kmeans", "tiny", context_length=64, vocab_size=512)
    text = replace(model.text, dim=128, heads=4)
    return replace(
        config,
        name="kmeans_scenes",
        model=replace(model, image_size=32, text=text),
        data=clip.SCENES_DATA,
        optim=replace(config.optim, lr=1.5e-3, warmup=50),
        train=replace(config.train, batch_size=32, steps=steps, precision="amp_bf16", threads=1),
    )


def base() -> RunConfig:
    """Centres of a CNN that stays as it is: set `train.init` to a run of the same CNN, whose
    features are then the same throughout, as X-LXMERT's detector's; only the text tower, which
    nothing here needs, still learns. Centres see each image as often as there are epochs.

    Source: allenai/x-lxmert feature_extraction/run_kmeans.py: 20 iterations over COCO's training
    images. Deviation: mini-batches, not all features at once.
    """
    return RunConfig(
        name="kmeans_base",
        model=preset_config("kmeans", "base"),
        objectives=OBJECTIVES,
        data=DataConfig(path="", max_tokens=32, vocab_size=30522, crop_scale=(1.0, 1.0)),
        optim=OptimConfig(lr=1e-4, wd=0.01, beta2=0.98, eps=1e-6, warmup=1000),
        train=TrainConfig(batch_size=256, epochs=20, precision="amp_bf16", freeze=("vision.*",)),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "scenes": scenes,
}
