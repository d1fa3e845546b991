"""Images alone: a visual tokenizer, and a model that predicts its codes of hidden patches."""

from __future__ import annotations

from vlpfast.models.config import CodebookConfig, ModelConfig
from vlpfast.models.presets.sizes import HALF, IMAGENET, SHAPES, build

_NO_TEXT = {"dim": 0, "heads": 1, "kind": "none"}
_COMPACT_CODES = 256


def beit2(size: str) -> ModelConfig:
    """BEiT v2: a vision transformer with relative positions that tells a tokenizer's codes of
    hidden patches, by itself and through the class token's head.

    Deviations: key biases, which a softmax does not see; no stochastic depth.

    Source: Peng et al. 2022, arXiv:2208.06366; microsoft/unilm beit2/PRETRAINING.md.
    """
    depth = SHAPES[size].vision
    return build(
        "beit2",
        size,
        (depth, 0, 0),
        vision={
            "position": "none",
            "relative_bias": "shared",
            "layer_scale": 0.1,
            "early_layers": 3 * depth // 4,
            "head_layers": 2,
        },
        text=_NO_TEXT,
        codes=_COMPACT_CODES,
        base={"codes": 8192},
        **IMAGENET,
    )


def vqkd(size: str) -> ModelConfig:
    """VQ-KD, BEiT v2's tokenizer: a vision transformer, 8192 codes of width 32, three blocks back
    to a teacher's features.

    Source: as `beit2`, section 2.1; microsoft/unilm beit2/TOKENIZER.md.
    """
    return build(
        "vqkd",
        size,
        (SHAPES[size].vision, 0, 0),
        text=_NO_TEXT,
        codebook=CodebookConfig(_COMPACT_CODES, 16, decoder_depth=1, target_dim=128),
        base={"codebook": CodebookConfig(8192)},
        **HALF,
    )
