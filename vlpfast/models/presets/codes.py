"""Images alone: a visual tokenizer, and a model that predicts its codes of hidden patches; and a
tokenizer of a CNN's cells.
"""

from __future__ import annotations

from vlpfast.models.config import CodebookConfig
from vlpfast.models.presets.dual import align
from vlpfast.models.presets.sizes import HALF, IMAGENET, Parts, Shape, merge

_NO_TEXT = {"dim": 0, "heads": 1, "kind": "none"}
_COMPACT_CODES = 256


def beit2(shape: Shape) -> Parts:
    """BEiT v2: a vision transformer with relative positions that tells a tokenizer's codes of
    hidden patches, by itself and through the class token's head.

    Deviation: key biases, which a softmax does not see.

    Source: Peng et al. 2022, arXiv:2208.06366; microsoft/unilm beit2/PRETRAINING.md.
    """
    return IMAGENET | {
        "depths": (shape.vision, 0, 0),
        "vision": {
            "position": "none",
            "relative_bias": "shared",
            "layer_scale": 0.1,
            "early_layers": 3 * shape.vision // 4,
            "head_layers": 2,
        },
        "text": _NO_TEXT,
        "codes": _COMPACT_CODES,
        "base": {"codes": 8192},
    }


def vqkd(shape: Shape) -> Parts:
    """VQ-KD, BEiT v2's tokenizer: a vision transformer, 8192 codes of width 32, three blocks back
    to a teacher's features.

    Source: as `beit2`, section 2.1; microsoft/unilm beit2/TOKENIZER.md.
    """
    return HALF | {
        "depths": (shape.vision, 0, 0),
        "text": _NO_TEXT,
        "codebook": CodebookConfig(_COMPACT_CODES, 16, decoder_depth=1, target_dim=128),
        "base": {"codebook": CodebookConfig(8192)},
    }


def kmeans(shape: Shape) -> Parts:
    """K-means centres of a CNN's cells, X-LXMERT's targets: a CNN beside BERT as `align`, which
    gives it something to learn, with a codebook. Base is ResNet-50's 8 x 8 cells of 256 px, and
    10,000 centres.

    Deviation: the CNN learns from texts, where X-LXMERT's is a detector's.

    Source: Cho et al. 2020 (X-LXMERT), section 4.1, arXiv:2009.11278; allenai/x-lxmert
    feature_extraction/run_kmeans.py.
    """
    cells = align(shape) | {"image_projection": True}
    width = cells["vision"]["dim"]
    own = {
        "vision": {"patch_size": 8},
        "codebook": CodebookConfig(_COMPACT_CODES, width, kind="kmeans", decay=0.98),
        "base": {
            "image_size": 256,
            "image_projection": True,
            "vision": {"dim": 2048, "cnn": "resnet50", "patch_size": 32},
            "codebook": CodebookConfig(10_000, 2048, kind="kmeans", decay=1.0),
        },
    }
    return merge(cells, own)
