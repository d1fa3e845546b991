"""Models that write captions."""

from __future__ import annotations

from vlpfast.models.presets.sizes import BERT, MOMENTUM_SCALE, Parts, Shape


def coca(shape: Shape) -> Parts:
    """CoCa: half of a causal decoder reads text alone and ends with the class token of the
    contrast, half reads the image; base is ViT-B/18 at 288 px under 12 + 12 layers, a vocabulary of
    64,000 with a weight of its own for the output.

    Images are read as the states of 256 learned queries, from which one more query pools the
    image's embedding. open_clip's model is this with `fusion.key_norm` and `fusion.mlp_between`,
    and with `vision.embed_norm` and without `vision.patch_bias`.

    Source: Yu et al. 2022, arXiv:2205.01917, table 1 and section 3.2; open_clip coca_model.py.
    """
    return {
        "depths": (shape.vision, shape.text, shape.fusion),
        "stacks": {"norm_eps": 1e-5},
        "vision": {"pool": "cascade", "num_queries": 64},
        "text": {"causal": True, "pool": "appended"},
        "fusion": {"causal": True},
        "embed_dim": shape.dim,
        "lm_head": "linear",
        "match_head": False,
        "base": {
            "depths": (12, 12, 12),
            "image_size": 288,
            "vision": {"patch_size": 18, "num_queries": 256},
            "text": {"vocab_size": 64000, "context_length": 64},
        },
    }


def blip(shape: Shape) -> Parts:
    """BLIP: one text network that reads text alone ([CLS] first) or with an image ([ENC] first),
    and a decoder ([DEC] first) that is the same but for self-attention; base is ViT-B/16 under 12
    BERT layers with cross-attention, 223.74 M parameters at 384 px without the decoder's own.

    The compact sizes normalise before each branch, as `albef`'s.

    Source: Li et al. 2022, arXiv:2201.12086; salesforce/BLIP models/blip_pretrain.py and med.py.
    """
    return MOMENTUM_SCALE | {
        "depths": (shape.vision, shape.fusion, shape.fusion),
        "text": {"pool": "first", "embed_norm": True, "task_tokens": 2},
        "fusion": {"shares_text": True},
        "embed_dim": shape.embed_dim,
        "lm_head": "tied",
        "decoder": True,
        "base": {
            "depths": (12, 12, 12),
            "embed_dim": 256,
            "text": {"vocab_size": 30524, "context_length": 512} | BERT,
            "fusion": BERT,
        },
    }
