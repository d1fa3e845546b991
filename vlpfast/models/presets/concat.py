"""One stack over text and image tokens in one sequence, of embeddings or of what towers give."""

from __future__ import annotations

from vlpfast.models.presets.sizes import (
    BERT,
    BERT_NORM,
    BERT_TEXT,
    BERT_WORDS,
    DETECTOR_REGIONS,
    HALF,
    SCENES_REGIONS,
    Parts,
    Shape,
    merge,
)


def _one_stack(shape: Shape) -> Parts:
    """A model whose only transformer is the one that text and image tokens share: 12 layers of 768
    at size base, as many as a compact dual model has for text.
    """
    return {
        "depths": (0, 0, shape.text + shape.fusion),
        "text": {"pool": "first", "embed_norm": True},
        "fusion": {"kind": "concat", "pooler": True},
        "mlm_head": True,
    }


def vilt(shape: Shape) -> Parts:
    """ViLT: one pre-norm stack over word and patch embeddings; base has 32-pixel patches of 384 px,
    111.60 M parameters, 112.22 M with the token head.

    Source: Kim et al. 2021, arXiv:2102.03334; dandelin/ViLT vilt/modules/vilt_module.py.
    """
    own = {
        # Of a compact image's 64 patches as large a share as 200 is of ViLT's largest image's 240.
        "vision": {"max_patches": 53},
        "text": {"norm_eps": 1e-12, "token_types": 2},
        "fusion": {"modality_types": True, "norm_eps": 1e-12},
        "base": {
            "image_size": 384,
            "vision": {"patch_size": 32, "max_patches": 200},
            "text": {"vocab_size": 30522, "context_length": 40},
            "fusion": {"dropout": 0.1},
        },
    }
    return merge(_one_stack(shape), HALF, own)


def uniter(shape: Shape) -> Parts:
    """UNITER: one BERT over words and detected regions; base has 109.90 M parameters with its
    embeddings, without the heads, and reads 2048-d features of 1,601 classes.

    The compact sizes normalise before each branch, as `albef`'s, and read the regions of the
    embedded scenes; for others set `vision.region_dim` and `vision.region_classes`.

    Source: Chen et al. 2020, arXiv:1909.11740; ChenRocks/UNITER config/uniter-base.json,
    model/model.py.
    """
    own = {
        "vision": SCENES_REGIONS,
        # One type: regions have theirs in their own front end.
        "text": {"token_types": 1},
        "region_heads": True,
        "base": {
            "stacks": BERT_NORM,
            "vision": DETECTOR_REGIONS,
            "text": {"vocab_size": 28996, "context_length": 512},
            "fusion": BERT,
        },
    }
    return merge(_one_stack(shape), own)


def pixel_bert(shape: Shape) -> Parts:
    """Pixel-BERT: one BERT over words and the cells of a CNN's grid, 100 of which training sees;
    base is ResNet-50 with its last map halved, images of 768 px.

    Deviations: group for batch normalisation, square images. The compact sizes normalise before
    each branch, as `albef`'s, and have a small CNN.

    Source: Huang et al. 2020, arXiv:2004.00849, section 3; no code was published.
    """
    own = {
        # Of 64 cells as large a share as 100 is of the largest published image's 240.
        "vision": {"front": "grid", "max_patches": 27},
        "text": {"token_types": 1},
        "base": {
            "image_size": 768,
            "stacks": BERT_NORM,
            "vision": {"cnn": "resnet50", "patch_size": 64, "max_patches": 100},
            "text": BERT_WORDS,
            "fusion": BERT,
        },
    }
    return merge(_one_stack(shape), own)


def flava(shape: Shape) -> Parts:
    """FLAVA: two pre-norm towers of the same shape, and a pre-norm stack of half their depth over
    what both give before their last norms, by a linear map each, and over a class token of its own,
    which matching reads; base is ViT-B/16 at 224 px: 239.58 M parameters without heads of fusion,
    241.36 M with transformers' three poolers, which no objective reads.

    Deviation: one head of words and one of codes serve the towers and fusion; FLAVA has two each.

    Source: Singh et al. 2022, arXiv:2112.04482, section 3; transformers models/flava.
    """
    return {
        "depths": (shape.vision, shape.vision, shape.vision // 2),
        "stacks": {"norm_eps": 1e-12},
        "text": BERT_TEXT,
        "fusion": {"kind": "concat", "class_token": True, "pooler": True},
        "embed_dim": shape.embed_dim,
        "projection_bias": True,
        "scale_min": 1.0,
        "mlm_head": True,
        "mlm_tied": False,
        "codes": 256,
        "code_transform": True,
        "base": {"codes": 8192, "text": BERT_WORDS},
    }
