"""Images alone: a visual tokenizer, and a model that predicts its codes of hidden patches; and a
tokenizer of a CNN's cells.
"""

from __future__ import annotations

from dataclasses import replace

from vlpfast.models.config import CodebookConfig, ModelConfig, TextConfig, VisionConfig
from vlpfast.models.presets.dual import align
from vlpfast.models.presets.sizes import compact

_NO_TEXT = TextConfig(0, 0, 1, kind="none")
_COMPACT_CODES = 256


def _images_alone(preset: str, size: str, *, vision: dict, **model) -> ModelConfig:
    """ViT-B/16 of 224 px, or a compact model's vision tower."""
    shape, image_size, patch_size, depth = {"dim": 768, "heads": 12}, 224, 16, 12
    if size != "base":
        shape, image_size, patch_size, (depth, _, _) = compact(size)
    return ModelConfig(
        preset,
        size,
        image_size=image_size,
        embed_dim=0,
        vision=VisionConfig(**shape, depth=depth, patch_size=patch_size, **vision),
        text=_NO_TEXT,
        **model,
    )


def beit2(size: str) -> ModelConfig:
    """BEiT v2: a vision transformer with relative positions that tells a tokenizer's codes of
    hidden patches, by itself and through the class token's head.

    Deviation: key biases, which a softmax does not see.

    Source: Peng et al. 2022, arXiv:2208.06366; microsoft/unilm beit2/PRETRAINING.md.
    """
    base = size == "base"
    depth = 12 if base else compact(size)[3][0]
    return _images_alone(
        "beit2",
        size,
        vision={
            "position": "none",
            "relative_bias": "shared",
            "layer_scale": 0.1,
            "early_layers": 3 * depth // 4,
            "head_layers": 2,
        },
        codes=8192 if base else _COMPACT_CODES,
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
    )


def vqkd(size: str) -> ModelConfig:
    """VQ-KD, BEiT v2's tokenizer: a vision transformer, 8192 codes of width 32, three blocks back
    to a teacher's features.

    Source: as `beit2`, section 2.1; microsoft/unilm beit2/TOKENIZER.md.
    """
    codebook = CodebookConfig(8192)
    if size != "base":
        codebook = CodebookConfig(_COMPACT_CODES, 16, decoder_depth=1, target_dim=128)
    return _images_alone(
        "vqkd",
        size,
        vision={},
        codebook=codebook,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )


def kmeans(size: str) -> ModelConfig:
    """K-means centres of a CNN's cells, X-LXMERT's targets: a CNN beside BERT as `align`, which
    gives it something to learn, with a codebook. Base is ResNet-50's 8 x 8 cells of 256 px, and
    10,000 centres.

    Deviation: the CNN learns from texts, where X-LXMERT's is a detector's.

    Source: Cho et al. 2020 (X-LXMERT), section 4.1, arXiv:2009.11278; allenai/x-lxmert
    feature_extraction/run_kmeans.py.
    """
    model, base = align(size), size == "base"
    vision = replace(model.vision, patch_size=8)
    if base:
        vision = VisionConfig(2048, 0, 1, front="cnn", cnn="resnet50", pool="mean", patch_size=32)
    return replace(
        model,
        preset="kmeans",
        image_size=256 if base else compact(size)[1],
        vision=vision,
        image_projection=True,
        codebook=CodebookConfig(
            10_000 if base else _COMPACT_CODES,
            vision.dim,
            kind="kmeans",
            decay=1.0 if base else 0.98,
        ),
    )
