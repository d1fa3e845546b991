"""Text that reads images by cross-attention."""

from __future__ import annotations

from vlpfast.models.config import FusionConfig, ModelConfig, TextConfig, VisionConfig
from vlpfast.models.presets.sizes import COMPACT, compact


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
    shape, image_size, patch_size, (vision, text, fusion) = compact(size)
    return ModelConfig(
        "albef",
        size,
        image_size=image_size,
        embed_dim=COMPACT[size]["embed_dim"],
        vision=VisionConfig(**shape, depth=vision, patch_size=patch_size),
        text=TextConfig(**shape, depth=text, context_length=77, **tokens),
        fusion=FusionConfig(**shape, depth=fusion),
        **heads,
    )
