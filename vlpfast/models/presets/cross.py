"""Text that reads images by cross-attention."""

from __future__ import annotations

from vlpfast.models.config import ModelConfig
from vlpfast.models.presets.sizes import BERT, BERT_WORDS, SHAPES, build


def albef(size: str) -> ModelConfig:
    """ALBEF; base is ViT-B/16 at 256 px, six BERT layers of text and six of fusion: 85.84 M +
    123.70 M parameters. The compact sizes normalise before each branch: from random weights, their
    contrastive loss falls earlier than in BERT's order (docs/facts.md).

    Source: Li et al. 2021, arXiv:2107.07651; salesforce/ALBEF models/model_pretrain.py,
    models/xbert.py.
    """
    shape = SHAPES[size]
    return build(
        "albef",
        size,
        (shape.vision, shape.text, shape.fusion),
        text={"pool": "first", "embed_norm": True, "token_types": 2},
        fusion={},
        embed_dim=shape.embed_dim,
        mlm_head=True,
        projection_bias=True,
        scale="temperature",
        scale_min=2.0,
        scale_max=1000.0,
        base={"image_size": 256, "embed_dim": 256, "text": BERT_WORDS | BERT, "fusion": BERT},
    )
