"""Two towers that meet in a joint space."""

from __future__ import annotations

from dataclasses import replace

from vlpfast.models.config import ModelConfig, TextConfig, VisionConfig
from vlpfast.models.presets.sizes import COMPACT, compact

# The small network's pooled features.
_SMALL_CNN = {"dim": 128, "depth": 0, "heads": 1, "front": "cnn", "cnn": "small", "pool": "mean"}
_HALF = (0.5, 0.5, 0.5)
_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}


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
    shape, image_size, patch_size, (vision, text, fusion) = compact(size)
    return ModelConfig(
        "clip",
        size,
        image_size=image_size,
        embed_dim=COMPACT[size]["embed_dim"],
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


def siglip(size: str) -> ModelConfig:
    """SigLIP; base is ViT-B/16, 203.16 M parameters. No class token, an attention pooler, text
    that sees both ways, a learned bias of the similarities. GELU is exact, as in open_clip (the
    JAX original approximates it by tanh).

    Source: Zhai et al. 2023, arXiv:2303.15343; open_clip model_configs/ViT-B-16-SigLIP.json.
    """
    heads = {
        "image_projection": False,
        "projection_bias": True,
        "scale_init": 10.0,
        "scale_max": 0.0,
        "logit_bias": True,
        "image_mean": _HALF,
        "image_std": _HALF,
    }
    pooled = {"class_token": False, "pool": "map"}
    if size == "base":
        return ModelConfig(
            "siglip",
            size,
            image_size=224,
            embed_dim=768,
            vision=VisionConfig(768, 12, 12, patch_size=16, **pooled),
            text=TextConfig(768, 12, 12, vocab_size=32000, context_length=64),
            **heads,
        )
    shape, image_size, patch_size, (vision, text, fusion) = compact(size)
    return ModelConfig(
        "siglip",
        size,
        image_size=image_size,
        embed_dim=shape["dim"],
        vision=VisionConfig(**shape, depth=vision, patch_size=patch_size, **pooled),
        text=TextConfig(**shape, depth=text + fusion, context_length=77),
        **heads,
    )


def align(size: str) -> ModelConfig:
    """ALIGN: a convolutional network beside BERT, a temperature that starts at 1 without bounds.

    Base is EfficientNet-B7 (timm's, up to its last feature map) and BERT-base: 171.53 M parameters;
    transformers counts 172.12 M with BERT's pooler, which its embeddings do not use. The compact
    sizes have a small ResNet, and text blocks as in `albef`.

    Source: Jia et al. 2021, arXiv:2102.05918, section 4; transformers models/align.
    """
    heads = {
        "image_projection": False,
        "projection_bias": True,
        "scale": "temperature",
        "scale_init": 1.0,
        "scale_max": 0.0,
        "image_mean": _HALF,
        "image_std": _HALF,
    }
    tokens = {"pool": "first", "embed_norm": True, "token_types": 2}
    if size == "base":
        bert = {"norm": "post", "norm_eps": 1e-12, "dropout": 0.1, "attention_dropout": 0.1}
        return ModelConfig(
            "align",
            size,
            image_size=289,
            embed_dim=640,
            vision=VisionConfig(640, 0, 1, front="cnn", cnn="tf_efficientnet_b7", pool="mean"),
            text=TextConfig(768, 12, 12, vocab_size=30522, context_length=512, **tokens, **bert),
            **heads,
        )
    shape, image_size, _, (_, text, fusion) = compact(size)
    return ModelConfig(
        "align",
        size,
        image_size=image_size,
        embed_dim=shape["dim"],
        vision=VisionConfig(**_SMALL_CNN),
        text=TextConfig(**shape, depth=text + fusion, context_length=77, **tokens),
        **heads | {"image_projection": True},
    )


def vsepp(size: str) -> ModelConfig:
    """VSE++: the global feature of a convolutional network, normalised and projected, beside the
    last state of a GRU over word vectors; cosines without a scale.

    Base is VGG-19's 4096 features (timm's), 300-d words and 1024 units. VSE++ starts from ImageNet
    weights and at first trains the projection and the GRU only; here all is trained.

    Source: Faghri et al. 2018, arXiv:1707.05612, section 4.1; fartashf/vsepp model.py.
    """
    heads = {"text_projection": False, "projection_bias": True, "scale": "none", "scale_init": 1.0}
    heads |= _IMAGENET
    if size == "base":
        return ModelConfig(
            "vse++",
            size,
            image_size=224,
            embed_dim=1024,
            vision=VisionConfig(4096, 0, 1, front="cnn", cnn="vgg19", unit_features=True),
            text=TextConfig(1024, 1, 1, kind="gru", word_dim=300),
            **heads,
        )
    shape, image_size, _, _ = compact(size)
    width = 2 * shape["dim"]
    return ModelConfig(
        "vse++",
        size,
        image_size=image_size,
        embed_dim=width,
        vision=VisionConfig(**_SMALL_CNN, unit_features=True),
        text=TextConfig(width, 1, 1, kind="gru", word_dim=shape["dim"] // 2),
        **heads,
    )
