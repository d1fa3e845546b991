"""Two towers that meet in a joint space."""

from __future__ import annotations

from vlpfast.models.presets.sizes import (
    BERT,
    BERT_TEXT,
    BERT_WORDS,
    HALF,
    IMAGENET,
    Parts,
    Shape,
)

# The small network's pooled features.
_SMALL_CNN = {"dim": 128, "heads": 1, "front": "cnn", "cnn": "small", "pool": "mean"}


def _two_towers(shape: Shape) -> Parts:
    """All the depth that a size has for text is the text tower's."""
    return {"depths": (shape.vision, shape.text + shape.fusion, 0), "embed_dim": shape.embed_dim}


def clip(shape: Shape) -> Parts:
    """CLIP; base is ViT-B/32, 151.28 M parameters.

    Source: Radford et al. 2021, arXiv:2103.00020, table 19.
    """
    return _two_towers(shape) | {
        "stacks": {"norm_eps": 1e-5, "activation": "quick_gelu"},
        "vision": {"patch_bias": False, "embed_norm": True},
        "text": {"causal": True},
        "base": {
            "embed_dim": 512,
            "vision": {"patch_size": 32},
            "text": {"dim": 512, "heads": 8, "vocab_size": 49408},
        },
    }


def flip(shape: Shape) -> Parts:
    """FLIP: CLIP with half of the patches dropped, fixed positions, mean pooling and a
    bidirectional text tower.

    Base is ViT-B/16. Source: Li et al. 2023, arXiv:2212.00794; facebookresearch/flip for positions
    and pooling.
    """
    return _two_towers(shape) | {
        "stacks": {"norm_eps": 1e-5},
        "vision": {"position": "sincos", "pool": "mean", "patch_dropout": 0.5},
        "text": {"pool": "first", "context_length": 32},
        "base": {"embed_dim": 512, "text": {"dim": 512, "heads": 8, "vocab_size": 30522}},
    }


def siglip(shape: Shape) -> Parts:
    """SigLIP; base is ViT-B/16, 203.16 M parameters. No class token, an attention pooler, text
    that sees both ways, a learned bias of the similarities. GELU is exact, as in open_clip (the
    JAX original approximates it by tanh).

    Source: Zhai et al. 2023, arXiv:2303.15343; open_clip model_configs/ViT-B-16-SigLIP.json.
    """
    return {
        **_two_towers(shape),
        **HALF,
        "vision": {"class_token": False, "pool": "map"},
        "embed_dim": shape.dim,
        "image_projection": False,
        "projection_bias": True,
        "scale_init": 10.0,
        "scale_max": 0.0,
        "logit_bias": True,
        "base": {"text": {"vocab_size": 32000, "context_length": 64}},
    }


def align(shape: Shape) -> Parts:
    """ALIGN: a convolutional network beside BERT, a temperature that starts at 1 without bounds.

    Base is EfficientNet-B7 (timm's, up to its last feature map) and BERT-base: 171.53 M parameters;
    transformers counts 172.12 M with BERT's pooler, which its embeddings do not use. The compact
    sizes have a small ResNet, and text blocks as in `albef`.

    Source: Jia et al. 2021, arXiv:2102.05918, section 4; transformers models/align.
    """
    return {
        **_two_towers(shape),
        **HALF,
        "vision": _SMALL_CNN | {"depth": 0},
        "text": BERT_TEXT,
        "embed_dim": shape.dim,
        "projection_bias": True,
        "scale": "temperature",
        "scale_init": 1.0,
        "scale_max": 0.0,
        "base": {
            "image_size": 289,
            "embed_dim": 640,
            "image_projection": False,
            "vision": {"dim": 640, "cnn": "tf_efficientnet_b7"},
            "text": BERT_WORDS | BERT,
        },
    }


def vsepp(shape: Shape) -> Parts:
    """VSE++: the global feature of a convolutional network, normalised and projected, beside the
    last state of a GRU over word vectors; cosines without a scale.

    Base is VGG-19's 4096 features (timm's), 300-d words and 1024 units. VSE++ starts from ImageNet
    weights and at first trains the projection and the GRU only; here all is trained.

    Source: Faghri et al. 2018, arXiv:1707.05612, section 4.1; fartashf/vsepp model.py.
    """
    return IMAGENET | {
        "depths": (0, 1, 0),
        "vision": _SMALL_CNN | {"unit_features": True},
        "text": {"dim": 2 * shape.dim, "heads": 1, "kind": "gru", "word_dim": shape.dim // 2},
        "embed_dim": 2 * shape.dim,
        "text_projection": False,
        "projection_bias": True,
        "scale": "none",
        "scale_init": 1.0,
        "base": {
            "embed_dim": 1024,
            "vision": {"dim": 4096, "cnn": "vgg19", "pool": "first"},
            "text": {"dim": 1024, "word_dim": 300},
        },
    }
