"""CLIP: contrast between two towers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlpfast.data.config import DataConfig
from vlpfast.models.config import ModelConfig
from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig


def compact(size: str) -> RunConfig:
    """`tiny` or `small`, for data sets of thousands of pairs on a CPU or one GPU."""
    return RunConfig(
        name=f"clip_{size}",
        model=preset_config("clip", size, context_length=64),
        objectives=ObjectivesConfig(itc=1.0),
        data=DataConfig(path="", max_tokens=32, vocab_size=4096, crop_scale=(0.6, 1.0)),
        optim=OptimConfig(lr=1e-3, wd=0.2, beta2=0.98, eps=1e-6, warmup=200, grad_clip_norm=1.0),
        train=TrainConfig(
            batch_size=256, steps=3000, precision="fp32", log_every_n_steps=50, save_every=500
        ),
    )


# Small drawings on white, an image's concept in the field `concept`. They fill the image in some
# vendors and four fifths of it in others, so crops are also shrunk.
EMOJI_DATA = DataConfig(
    path="",
    id_key="concept",
    vocab_size=2048,
    max_tokens=20,
    crop_scale=(0.5, 1.0),
    zoom_out=1.6,
    hflip=0.3,
    color_jitter=0.4,
    grayscale=0.25,
    cache_gib=1.0,
)


def emoji_model(model: ModelConfig, steps: int) -> ModelConfig:
    """A compact `model` for 48 px: half of the patches dropped but in the last twentieth of the
    steps (FLIP's unmasked tuning), fixed positions and mean pooling.
    """
    vision = replace(
        model.vision,
        position="sincos",
        pool="mean",
        patch_dropout=0.5,
        patch_dropout_steps=steps * 19 // 20,
    )
    return replace(model, image_size=48, vision=vision, text=replace(model.text, depth=2))


# Rendered scenes: whole images, captions of up to 48 tokens from few words.
SCENES_DATA = DataConfig(
    path="", vocab_size=512, max_tokens=48, crop_scale=(1.0, 1.0), cache_gib=1.0
)
# Of a scene's captions the first, which says everything.
SCENES_IN_FULL = replace(SCENES_DATA, captions=(0,))


def narrow(model: ModelConfig, **others: object) -> ModelConfig:
    """A compact `model` with all stacks 128 wide and 4 heads, for minutes on a core; `others` are
    further fields.
    """
    shape = {"dim": 128, "heads": 4}
    return replace(
        model,
        vision=replace(model.vision, **shape),
        text=replace(model.text, **shape),
        fusion=replace(model.fusion, **shape) if model.fusion.depth else model.fusion,
        **others,
    )


def mostly_words(objectives: ObjectivesConfig, probability: float) -> ObjectivesConfig:
    """One of `objectives` a step, masked words in three of four, a share `probability` of them.

    From random weights a masked word is what first makes a model look at the image, the more so the
    less the other words tell; matching and alignment say little before.
    """
    others = sorted(objectives.weights.keys() - {"mlm", "wra"})
    mix = (("mlm", 3.0 * len(others)), *((name, 1.0) for name in others))
    return replace(objectives, mix=mix, mlm_probability=probability)


def scenes(config: RunConfig, name: str, *, steps: int) -> RunConfig:
    """A compact dual-tower `config` on the embedded data: minutes on one core."""
    return replace(
        config,
        name=name,
        model=replace(config.model, text=replace(config.model.text, vocab_size=512)),
        data=SCENES_DATA,
        optim=replace(config.optim, lr=1.5e-3, warmup=50),
        train=replace(config.train, batch_size=64, steps=steps, precision="amp_bf16", threads=1),
    )


def emoji(*, steps: int = 11_000) -> RunConfig:
    """`tiny` on the emoji set. With other `train.steps`, set `model.vision.patch_dropout_steps`
    too.
    """
    config = compact("tiny")
    return replace(
        config,
        name="clip_emoji",
        model=emoji_model(config.model, steps),
        data=EMOJI_DATA,
        train=replace(config.train, batch_size=128, steps=steps, precision="amp_bf16", threads=1),
    )


def base() -> RunConfig:
    """ViT-B/32 with the published schedule.

    Source: Radford et al. 2021, arXiv:2103.00020, tables 18 and 19.
    """
    return RunConfig(
        name="clip_base",
        model=preset_config("clip", "base"),
        objectives=ObjectivesConfig(itc=1.0),
        data=DataConfig(
            path="", tokenizer="clip", max_tokens=77, vocab_size=49408, crop_scale=(0.9, 1.0)
        ),
        optim=OptimConfig(lr=5e-4, wd=0.2, beta2=0.98, eps=1e-6, warmup=2000),
        train=TrainConfig(batch_size=1024, epochs=32, precision="amp_bf16"),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "emoji": emoji,
}
