"""What the three sizes give to every preset, and a preset as what it changes of that."""

from __future__ import annotations

from typing import NamedTuple

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

# BERT's blocks, its text, and how pixels are normalised where CLIP's way is not it.
BERT_NORM = {"norm": "post", "norm_eps": 1e-12}
BERT = {**BERT_NORM, "dropout": 0.1, "attention_dropout": 0.1}
BERT_WORDS = {"vocab_size": 30522, "context_length": 512}
HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}


def build(
    preset: str,
    size: str,
    depths: tuple[int, int, int],
    *,
    vision: dict | None = None,
    text: dict | None = None,
    fusion: dict | None = None,
    base: dict | None = None,
    **model,
) -> ModelConfig:
    """The configuration of a preset.

    Args:
        preset, size: its name, and one of `SHAPES`.
        depths: of vision, text and fusion.
        vision, text, fusion: fields of the stacks where they are not the size's; `fusion` None is a
            model without one.
        base: what size base has besides: fields of the model, and of "vision", "text", "fusion".
        **model: fields of the model; one without `embed_dim` has no joint space.
    """
    shape, published = SHAPES[size], (base or {}) if size == "base" else {}
    vision = vision or {}
    if vision.get("front", "patches") in ("patches", "grid"):
        vision = {"patch_size": shape.patch_size} | vision
    fields = {"image_size": shape.image_size, "embed_dim": 0} | model | published
    stacks = {"vision": VisionConfig, "text": TextConfig, "fusion": FusionConfig}
    for (name, kind), depth, own in zip(
        stacks.items(), depths, (vision, text or {}, fusion), strict=True
    ):
        if own is not None:
            common = {"dim": shape.dim, "heads": shape.heads, "depth": depth}
            fields[name] = kind(**common | own | published.get(name, {}))
    return ModelConfig(preset, size, **fields)
