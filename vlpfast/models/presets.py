"""The systems of the field as configurations of one model.

`base` has the published sizes; `tiny` and `small` train on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

from vlpfast.config import close_match
from vlpfast.models.config import FusionConfig, ModelConfig, TextConfig, VisionConfig

# Width, heads, (vision, text, fusion) depth, patch and image side, width of the joint space.
_COMPACT = {
    "tiny": {
        "dim": 192,
        "heads": 6,
        "depths": (4, 2, 2),
        "patch_size": 8,
        "image_size": 64,
        "embed_dim": 128,
    },
    "small": {
        "dim": 384,
        "heads": 6,
        "depths": (8, 4, 4),
        "patch_size": 16,
        "image_size": 128,
        "embed_dim": 256,
    },
}


def _compact(size: str) -> tuple[dict, int, int, tuple[int, int, int]]:
    part = _COMPACT[size]
    return (
        {"dim": part["dim"], "heads": part["heads"]},
        part["image_size"],
        part["patch_size"],
        part["depths"],
    )


def clip(size: str) -> ModelConfig:
    """CLIP; base is ViT-B/32, 151.28 M parameters.

    Source: Radford et al. 2021, arXiv:2103.00020, table 19.
    """
    common = {"norm_eps": 1e-5, "activation": "quick_gelu"}
    vision_only = {"patch_bias": False, "embed_norm": True}
    if size == "base":
        return ModelConfig(
            "clip",
            size,
            image_size=224,
            embed_dim=512,
            vision=VisionConfig(768, 12, 12, patch_size=32, **common, **vision_only),
            text=TextConfig(
                512, 12, 8, vocab_size=49408, context_length=77, causal=True, pool="last", **common
            ),
        )
    shape, image_size, patch_size, (vision, text, fusion) = _compact(size)
    return ModelConfig(
        "clip",
        size,
        image_size=image_size,
        embed_dim=_COMPACT[size]["embed_dim"],
        vision=VisionConfig(**shape, depth=vision, patch_size=patch_size, **common, **vision_only),
        text=TextConfig(
            **shape, depth=text + fusion, context_length=77, causal=True, pool="last", **common
        ),
    )


def flip(size: str) -> ModelConfig:
    """FLIP: CLIP with half of the patches dropped, fixed positions, mean pooling and a
    bidirectional text tower.

    Base is ViT-B/16. Source: Li et al. 2023, arXiv:2212.00794; facebookresearch/flip for positions
    and pooling.
    """
    config = clip(size)
    vision = replace(
        config.vision,
        patch_size=16 if size == "base" else config.vision.patch_size,
        activation="gelu",
        embed_norm=False,
        patch_bias=True,
        position="sincos",
        pool="mean",
        patch_dropout=0.5,
    )
    text = replace(config.text, activation="gelu", causal=False, pool="first", context_length=32)
    if size == "base":
        text = replace(text, vocab_size=30522)
    return replace(config, preset="flip", vision=vision, text=text)


def albef(size: str) -> ModelConfig:
    """ALBEF; base is ViT-B/16 at 256 px, six BERT layers of text and six of fusion: 85.84 M +
    123.70 M parameters. The compact sizes normalise before each branch: from random weights, their
    contrastive loss falls earlier than in BERT's order (docs/facts.md).

    Source: Li et al. 2021, arXiv:2107.07651; salesforce/ALBEF models/model_pretrain.py,
    models/xbert.py.
    """
    heads = {
        "mlm_head": True,
        "projection_bias": True,
        "scale": "temperature",
        "scale_min": 2.0,
        "scale_max": 1000.0,
    }
    tokens = {"pool": "first", "embed_norm": True, "token_types": 2}
    if size == "base":
        bert = {"norm": "post", "norm_eps": 1e-12, "dropout": 0.1, "attention_dropout": 0.1}
        return ModelConfig(
            "albef",
            size,
            image_size=256,
            embed_dim=256,
            vision=VisionConfig(768, 12, 12, patch_size=16),
            text=TextConfig(768, 6, 12, vocab_size=30522, context_length=512, **tokens, **bert),
            fusion=FusionConfig(768, 6, 12, **bert),
            **heads,
        )
    shape, image_size, patch_size, (vision, text, fusion) = _compact(size)
    return ModelConfig(
        "albef",
        size,
        image_size=image_size,
        embed_dim=_COMPACT[size]["embed_dim"],
        vision=VisionConfig(**shape, depth=vision, patch_size=patch_size),
        text=TextConfig(**shape, depth=text, context_length=77, **tokens),
        fusion=FusionConfig(**shape, depth=fusion),
        **heads,
    )


def _one_stack(
    preset: str,
    size: str,
    *,
    image_size: int,
    vision: dict,
    text: dict,
    fusion: dict,
    **model,
) -> ModelConfig:
    """A model whose only transformer is the one that text and image tokens share: 12 layers of 768
    at size base, as many as a compact dual model has for text.
    """
    if size == "base":
        shape, depth = {"dim": 768, "heads": 12}, 12
    else:
        shape, _, _, (_, text_depth, fusion_depth) = _compact(size)
        depth = text_depth + fusion_depth
    return ModelConfig(
        preset,
        size,
        image_size=image_size,
        embed_dim=0,
        vision=VisionConfig(**shape, depth=0, **vision),
        text=TextConfig(**shape, depth=0, pool="first", embed_norm=True, **text),
        fusion=FusionConfig(**shape, depth=depth, kind="concat", pooler=True, **fusion),
        mlm_head=True,
        **model,
    )


def vilt(size: str) -> ModelConfig:
    """ViLT: one pre-norm stack over word and patch embeddings; base has 32-pixel patches of 384 px,
    111.60 M parameters, 112.22 M with the token head.

    Source: Kim et al. 2021, arXiv:2102.03334; dandelin/ViLT vilt/modules/vilt_module.py.
    """
    base = size == "base"
    image_size, patch_size = (384, 32) if base else _compact(size)[1:3]
    return _one_stack(
        "vilt",
        size,
        image_size=image_size,
        # Of a compact image's 64 patches as large a share as 200 is of ViLT's largest image's 240.
        vision={"patch_size": patch_size, "max_patches": 200 if base else 53},
        text={
            "vocab_size": 30522 if base else 4096,
            "context_length": 40 if base else 77,
            "norm_eps": 1e-12,
            "token_types": 2,
        },
        fusion={"modality_types": True, "norm_eps": 1e-12, "dropout": 0.1 if base else 0.0},
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )


def uniter(size: str) -> ModelConfig:
    """UNITER: one BERT over words and detected regions; base has 109.90 M parameters with its
    embeddings, without the heads, and reads 2048-d features of 1,601 classes.

    The compact sizes normalise before each branch, as `albef`'s, and read the regions of the
    embedded scenes; for others set `vision.region_dim` and `vision.region_classes`.

    Source: Chen et al. 2020, arXiv:1909.11740; ChenRocks/UNITER config/uniter-base.json,
    model/model.py.
    """
    base = size == "base"
    bert = {"norm": "post", "norm_eps": 1e-12} if base else {"norm_eps": 1e-6}
    dropout = {"dropout": 0.1, "attention_dropout": 0.1} if base else {}
    regions = (2048, 1601) if base else (64, 65)
    return _one_stack(
        "uniter",
        size,
        image_size=224 if base else _compact(size)[1],
        vision={
            "front": "regions",
            "region_dim": regions[0],
            "region_classes": regions[1],
            **bert,
        },
        # One type: regions have theirs in their own front end.
        text={
            "vocab_size": 28996 if base else 4096,
            "context_length": 512 if base else 77,
            "token_types": 1,
            **bert,
        },
        fusion=bert | dropout,
        region_heads=True,
    )


def pixel_bert(size: str) -> ModelConfig:
    """Pixel-BERT: one BERT over words and the cells of a CNN's grid, 100 of which training sees;
    base is ResNet-50 with its last map halved, images of 768 px.

    Deviations: group for batch normalisation, square images. The compact sizes normalise before
    each branch, as `albef`'s, and have a small CNN.

    Source: Huang et al. 2020, arXiv:2004.00849, section 3; no code was published.
    """
    base = size == "base"
    bert = {"norm": "post", "norm_eps": 1e-12} if base else {"norm_eps": 1e-6}
    dropout = {"dropout": 0.1, "attention_dropout": 0.1} if base else {}
    grid = {"grid_cnn": "resnet50", "patch_size": 64, "max_patches": 100}
    if not base:
        # Of 64 cells as large a share as 100 is of the largest published image's 240.
        grid = {"grid_cnn": "small", "patch_size": _compact(size)[2], "max_patches": 27}
    return _one_stack(
        "pixel-bert",
        size,
        image_size=768 if base else _compact(size)[1],
        vision={"front": "grid", **grid, **bert},
        text={
            "vocab_size": 30522 if base else 4096,
            "context_length": 512 if base else 77,
            "token_types": 1,
            **bert,
        },
        fusion=bert | dropout,
    )


_PRESETS: dict[str, Callable[[str], ModelConfig]] = {
    "albef": albef,
    "clip": clip,
    "flip": flip,
    "pixel-bert": pixel_bert,
    "uniter": uniter,
    "vilt": vilt,
}
SIZES = ("tiny", "small", "base")


def missing(preset: str, part: str) -> str:
    """What an error says where a preset lacks one of `ModelConfig.parts`."""
    having = [name for name in list_presets() if part in preset_config(name).parts]
    bare = part.removeprefix("a ")
    return f"preset {preset!r} has no {bare}; presets that have: {', '.join(map(repr, having))}"


def list_presets() -> list[str]:
    """Names accepted by `create_model` and `preset_config`."""
    return sorted(_PRESETS)


def preset_config(
    preset: str,
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    context_length: int | None = None,
    **overrides,
) -> ModelConfig:
    """The configuration of a preset.

    Args:
        preset: one of `list_presets()`.
        size: "tiny", "small" or "base".
        vocab_size, context_length: of the text tower, where they differ from the preset's.
        **overrides: other fields of `ModelConfig`.

    Raises:
        ValueError: unknown preset, size or field.
    """
    if preset not in _PRESETS:
        raise ValueError(f"unknown preset {preset!r}{close_match(preset, list_presets())}")
    if size not in SIZES:
        raise ValueError(f"size must be one of {list(SIZES)}, got {size!r}")
    known = [f.name for f in fields(ModelConfig)]
    unknown = [name for name in overrides if name not in known]
    if unknown:
        raise ValueError(f"unknown model field {unknown[0]!r}{close_match(unknown[0], known)}")
    config = replace(_PRESETS[preset](size), **overrides)
    text = {"vocab_size": vocab_size, "context_length": context_length}
    return replace(
        config, text=replace(config.text, **{k: v for k, v in text.items() if v is not None})
    )
