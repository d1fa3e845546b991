"""An encoder of image and prompt, and a decoder that writes what answers it: in words, or in any
token of one vocabulary.
"""

from __future__ import annotations

from vlpfast.models.presets.sizes import IMAGENET, Parts, Shape


def pali(shape: Shape) -> Parts:
    """PaLI: an image tower, a linear connector, an encoder of image and prompt, a decoder of text;
    every task is text out, and the prompt says which.

    The smallest published model is ViT-G/14 with mT5-Large. Base is what their families have for
    this size, from memory: ViT-B/16 at 224 px, mT5-Base's 12 + 12 layers of 768 with 12 heads and a
    vocabulary of 250,112, whose output weight is its own.

    Deviations: learned positions in place of mT5's relative bias; LayerNorm and biases in place of
    RMSNorm; an MLP of 3072 in place of a gated one of 2048 (as many weights). No code was
    published.

    Source: Chen et al. 2022, arXiv:2209.06794, sections 3.1 and 3.2; Xue et al. 2020 (mT5),
        arXiv:2010.11934.
    """
    return {
        "depths": (shape.vision, 0, shape.text),
        "vision": {"class_token": False, "pool": "mean"},
        "fusion": {"kind": "seq2seq", "causal": True},
        "lm_head": "linear",
        "match_head": False,
        "base": {
            "depths": (12, 0, 12),
            "text": {"vocab_size": 250_112, "context_length": 512},
        },
    }


def unified_io(shape: Shape) -> Parts:
    """Unified-IO: an encoder of raw patches and prompt, a decoder, and one vocabulary of words,
    location tokens and image codes, read and written by one table; every task is tokens out.

    Base is T5's: 12 + 12 layers of 768 with 12 heads, 384 px in patches of 16, 33,152 words and
    locations (1,000 of them) and 16,384 codes; texts, and images that are written, of at most 256
    tokens.

    Deviations: learned positions alone, those of patches drawn N(0, 1) as published and one table
    for prompts and texts, without relative biases and projected absolute ones (3.5 M); LayerNorm
    and biases in place of RMSNorm; an MLP of 3072 in place of a gated one of 2048 (as many
    weights); which segment a token is of is told the encoder alone; logits are of the whole
    vocabulary, not of words or codes by the task, and not divided by sqrt(768), as the table begins
    narrow.

    Source: Lu et al. 2022, arXiv:2206.08916; allenai/unified-io-inference uio/configs.py,
        uio/network.py.
    """
    return IMAGENET | {
        "depths": (0, 0, shape.text + shape.fusion),
        "vision": {
            "position_scale": 100.0,
            "class_token": False,
            "pool": "mean",
            "embed_norm": True,
        },
        "text": {"context_length": 80, "image_codes": 256, "embed_norm": True},
        "fusion": {"kind": "seq2seq", "causal": True, "modality_types": True},
        "lm_head": "table",
        "match_head": False,
        "base": {
            "image_size": 384,
            "text": {"vocab_size": 33_152, "context_length": 258, "image_codes": 16_384},
        },
    }
