"""Models that write captions."""

from __future__ import annotations

from vlpfast.models.config import FusionConfig, ModelConfig, TextConfig, VisionConfig
from vlpfast.models.presets.sizes import compact


def coca(size: str) -> ModelConfig:
    """CoCa: half of a causal decoder reads text alone and ends with the class token of the
    contrast, half reads the image; base is ViT-B/18 at 288 px under 12 + 12 layers, a vocabulary of
    64,000 with a weight of its own for the output.

    Images are read as the states of 256 learned queries, from which one more query pools the
    image's embedding. open_clip's model is this with `fusion.key_norm` and `fusion.mlp_between`,
    and with `vision.embed_norm` and without `vision.patch_bias`.

    Source: Yu et al. 2022, arXiv:2205.01917, table 1 and section 3.2; open_clip coca_model.py.
    """
    common = {"norm_eps": 1e-5}
    pooled = {"pool": "cascade", "num_queries": 256 if size == "base" else 64}
    words = {"causal": True, "pool": "appended"}
    if size == "base":
        return ModelConfig(
            "coca",
            size,
            image_size=288,
            embed_dim=768,
            vision=VisionConfig(768, 12, 12, patch_size=18, **pooled, **common),
            text=TextConfig(768, 12, 12, vocab_size=64000, context_length=64, **words, **common),
            fusion=FusionConfig(768, 12, 12, causal=True, **common),
            lm_head="linear",
        )
    shape, image_size, patch_size, (vision, text, fusion) = compact(size)
    return ModelConfig(
        "coca",
        size,
        image_size=image_size,
        embed_dim=shape["dim"],
        vision=VisionConfig(**shape, depth=vision, patch_size=patch_size, **pooled, **common),
        text=TextConfig(**shape, depth=text, context_length=77, **words, **common),
        fusion=FusionConfig(**shape, depth=fusion, causal=True, **common),
        lm_head="linear",
    )
