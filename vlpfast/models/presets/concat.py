"""One stack over text and image tokens in one sequence."""

from __future__ import annotations

from vlpfast.models.config import FusionConfig, ModelConfig, TextConfig, VisionConfig
from vlpfast.models.presets.sizes import compact


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
        shape, _, _, (_, text_depth, fusion_depth) = compact(size)
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
    image_size, patch_size = (384, 32) if base else compact(size)[1:3]
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
        image_size=224 if base else compact(size)[1],
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
    grid = {"cnn": "resnet50", "patch_size": 64, "max_patches": 100}
    if not base:
        # Of 64 cells as large a share as 100 is of the largest published image's 240.
        grid = {"cnn": "small", "patch_size": compact(size)[2], "max_patches": 27}
    return _one_stack(
        "pixel-bert",
        size,
        image_size=768 if base else compact(size)[1],
        vision={"front": "grid", **grid, **bert},
        text={
            "vocab_size": 30522 if base else 4096,
            "context_length": 512 if base else 77,
            "token_types": 1,
            **bert,
        },
        fusion=bert | dropout,
    )
