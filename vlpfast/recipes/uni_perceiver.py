"""Uni-Perceiver: one encoder, everything is similarity to encoded targets; one task a step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlpfast.data.config import DataConfig
from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.recipes import clip
from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig

# Weights and ratios of the published tasks: retrieval, masked words, captions.
PAIRS = ObjectivesConfig(
    itc=0.5,
    mlm=0.5,
    lm=1.0,
    label_smoothing=0.1,
    mix=(("itc", 1.78), ("mlm", 2.75), ("lm", 1.78)),
)
# And class names.
OBJECTIVES = replace(PAIRS, classify=1.0, mix=(*PAIRS.mix, ("classify", 2.49)))


def compact(size: str, preset: str = "uni-perceiver") -> RunConfig:
    """`tiny` or `small`, for data sets of thousands of pairs on a CPU or one GPU; where they have
    class names, set `objectives.classify`, `objectives.mix` and `data.classes`.
    """
    config = clip.compact(size)
    return replace(
        config,
        name=f"{preset.replace('-', '_')}_{size}",
        model=preset_config(preset, size, context_length=64),
        objectives=PAIRS,
        optim=OptimConfig(lr=5e-4, wd=0.05, beta2=0.98, eps=1e-6, warmup=200, grad_clip_norm=1.0),
        train=replace(config.train, batch_size=128),
    )


def scenes(preset: str = "uni-perceiver", *, steps: int = 1200) -> RunConfig:
    """`tiny`, 128 wide, on the embedded data; its objects are the classes: minutes on a core."""
    config = compact("tiny", preset)
    model = preset_config(preset, "tiny", context_length=64, vocab_size=512)
    return replace(
        config,
        name=f"{preset.replace('-', '_')}_scenes",
        model=clip.narrow(model),
        objectives=replace(OBJECTIVES, mlm_probability=0.3, label_smoothing=0.0),
        data=replace(clip.SCENES_DATA, classes="scenes"),
        optim=replace(config.optim, lr=1.5e-3, warmup=100),
        train=replace(config.train, batch_size=64, steps=steps, precision="amp_bf16", threads=1),
    )


def base(preset: str = "uni-perceiver") -> RunConfig:
    """The published optimizer and task weights on one data set of pairs whose records hold class
    names; there, 15 data sets are mixed, with images of 160 px first.

    Source: fundamentalvision/Uni-Perceiver
        configs/BERT_L12_H768_experiments/16tasks_training_basemoe_stage1_56gpu.yaml.
    """
    return RunConfig(
        name=f"{preset.replace('-', '_')}_base",
        model=preset_config(preset, "base"),
        objectives=OBJECTIVES,
        data=DataConfig(
            path="", classes="class_name", max_tokens=50, vocab_size=49408, crop_scale=(0.2, 1.0)
        ),
        optim=OptimConfig(lr=1e-3, wd=0.2, beta2=0.95, eps=1e-6, warmup=10_000, grad_clip_norm=0.1),
        train=TrainConfig(batch_size=512, steps=230_000, precision="amp_bf16"),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "scenes": scenes,
}
