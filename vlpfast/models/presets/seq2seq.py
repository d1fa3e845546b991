"""An encoder of image and prompt, and a decoder that writes what answers it."""

from __future__ import annotations

from vlpfast.models.config import FusionConfig, ModelConfig, TextConfig, VisionConfig
from vlpfast.models.presets.sizes import compact


def pali(size: str) -> ModelConfig:
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
    base = size == "base"
    if base:
        shape, image_size, patch_size = {"dim": 768, "heads": 12}, 224, 16
        vision = depth = 12
    else:
        shape, image_size, patch_size, (vision, depth, _) = compact(size)
    return ModelConfig(
        "pali",
        size,
        image_size=image_size,
        embed_dim=0,
        vision=VisionConfig(
            **shape, depth=vision, patch_size=patch_size, class_token=False, pool="mean"
        ),
        text=TextConfig(
            **shape,
            depth=0,
            vocab_size=250_112 if base else 4096,
            context_length=512 if base else 77,
        ),
        fusion=FusionConfig(**shape, depth=depth, kind="seq2seq", causal=True),
        lm_head="linear",
        match_head=False,
    )
