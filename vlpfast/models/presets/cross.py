"""Text that reads images by cross-attention."""

from __future__ import annotations

from vlpfast.models.presets.sizes import (
    BERT,
    BERT_TEXT,
    BERT_WORDS,
    MOMENTUM_SCALE,
    Parts,
    Shape,
)


def albef(shape: Shape) -> Parts:
    """ALBEF; base is ViT-B/16 at 256 px, six BERT layers of text and six of fusion: 85.84 M +
    123.70 M parameters. The compact sizes normalise before each branch: from random weights, their
    contrastive loss falls earlier than in BERT's order (docs/facts.md).

    Source: Li et al. 2021, arXiv:2107.07651; salesforce/ALBEF models/model_pretrain.py,
    models/xbert.py.
    """
    return MOMENTUM_SCALE | {
        "depths": (shape.vision, shape.text, shape.fusion),
        "text": BERT_TEXT,
        "fusion": {},
        "embed_dim": shape.embed_dim,
        "mlm_head": True,
        "base": {"image_size": 256, "embed_dim": 256, "text": BERT_WORDS | BERT, "fusion": BERT},
    }
