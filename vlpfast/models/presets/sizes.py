"""What the three sizes give to every preset, and a preset as what it changes of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from vlpfast.models.config import FusionConfig, ModelConfig, TextConfig, VisionConfig


class Shape(NamedTuple):
    """A size: width and heads of every stack; depths where a model has the three of them; sides of
    a patch and of the image, pixels; width of the joint space.
    """

    dim: int
    heads: int
    vision: int
    text: int
    fusion: int
    patch_size: int
    image_size: int
    embed_dim: int


# `tiny` and `small` train on a CPU; `base` is ViT-B/16 with a BERT's layers for text.
SHAPES = {
    "tiny": Shape(192, 6, 4, 2, 2, patch_size=8, image_size=64, embed_dim=128),
    "small": Shape(384, 6, 8, 4, 4, patch_size=16, image_size=128, embed_dim=256),
    "base": Shape(768, 12, 12, 6, 6, patch_size=16, image_size=224, embed_dim=768),
}

# BERT's blocks, its embedding of text, and how pixels are normalised where CLIP's way is not it.
BERT_NORM = {"norm": "post", "norm_eps": 1e-12}
BERT = {**BERT_NORM, "dropout": 0.1, "attention_dropout": 0.1}
BERT_TEXT = {"pool": "first", "embed_norm": True, "token_types": 2}
BERT_WORDS = {"vocab_size": 30522, "context_length": 512}
HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
# Regions of the embedded scenes, and of the detector of Anderson et al. 2018.
SCENES_REGIONS = {"front": "regions", "region_dim": 64, "region_classes": 65}
DETECTOR_REGIONS = {"region_dim": 2048, "region_classes": 1601}
# ALBEF's joint space.
MOMENTUM_SCALE = {
    "projection_bias": True,
    "scale": "temperature",
    "scale_min": 2.0,
    "scale_max": 1000.0,
}

# What a preset says at one size: fields of the model, "depths" of vision, text and fusion, fields
# of each stack under its name and of all under "stacks", and under "base" what size base has
# besides, in the same form.
Parts = dict[str, Any]
_STACKS = {"vision": VisionConfig, "text": TextConfig, "fusion": FusionConfig}


def merge(*parts: Parts) -> Parts:
    """Later ones over earlier ones, and so what is under a name that both have."""
    merged: Parts = {}
    for name, value in (item for part in parts for item in part.items()):
        nested = isinstance(value, dict) and name in merged
        merged[name] = merge(merged[name], value) if nested else value
    return merged


def build(preset: str, size: str, parts: Callable[[Shape], Parts]) -> ModelConfig:
    """The configuration of a preset: what `parts` says over what the size gives to every preset.

    One without "fusion" has no such stack, one without "embed_dim" no joint space.
    """
    shape = SHAPES[size]
    start = {"image_size": shape.image_size, "embed_dim": 0, "vision": {}, "text": {}, "stacks": {}}
    fields = merge(start, parts(shape))
    base = fields.pop("base", {})
    fields = merge(fields, base) if size == "base" else fields
    common = {"dim": shape.dim, "heads": shape.heads} | fields.pop("stacks")
    if fields["vision"].get("front", "patches") in ("patches", "grid"):
        fields["vision"] = {"patch_size": shape.patch_size} | fields["vision"]
    for (name, stack), depth in zip(_STACKS.items(), fields.pop("depths"), strict=True):
        if name in fields:
            fields[name] = stack(**common | {"depth": depth} | fields[name])
    return ModelConfig(preset, size, **fields)
