"""One stack with experts by modality: fusion encoder, and each modality's tower."""

from __future__ import annotations

from vlpfast.models.config import FusionConfig, ModelConfig, TextConfig, VisionConfig
from vlpfast.models.presets.sizes import COMPACT, compact

_HALF = (0.5, 0.5, 0.5)


def beit3(size: str) -> ModelConfig:
    """BEiT-3 as released: all projections, norms and MLPs per modality, only the attention's
    product in common, Sub-LN; base is ViT-B/16 at 224 px with 64,010 tokens: 220.99 M parameters,
    1.18 M more in the projections of contrast, 49.2 M in the token head, 6.3 M in that of codes.

    Source: Wang et al. 2022, arXiv:2208.10442; microsoft/unilm beit3/modeling_utils.py, torchscale
    model/BEiT3.py.
    """
    base = size == "base"
    shape, image_size, patch_size, (_, text, fusion) = (
        ({"dim": 768, "heads": 12}, 224, 16, (0, 6, 6)) if base else compact(size)
    )
    eps = {"norm_eps": 1e-5}
    return ModelConfig(
        "beit3",
        size,
        image_size=image_size,
        embed_dim=768 if base else COMPACT[size]["embed_dim"],
        vision=VisionConfig(**shape, depth=0, patch_size=patch_size, **eps),
        text=TextConfig(
            **shape,
            depth=0,
            vocab_size=64010 if base else 4096,
            context_length=1022 if base else 77,
            pool="first",
            **eps,
        ),
        fusion=FusionConfig(
            **shape,
            depth=text + fusion,
            kind="concat",
            norm="sub",
            experts="multiway",
            order="image",
            **eps,
        ),
        codes=8192 if base else 256,
        mlm_head=True,
        mlm_transform=False,
        mlm_tied=False,
        match_head=False,
        image_mean=_HALF,
        image_std=_HALF,
    )


def vlmo(size: str) -> ModelConfig:
    """VLMo: self-attention in common, an MLP and its norm per modality, and in the last two layers
    one more for pairs; LayerScale, relative positions only, two pairs of embeddings. Base is
    ViT-B/16 at 224 px: 175.43 M parameters without pooler and heads.

    Deviations: images stand before texts, which changes no number; each MLP has its own LayerScale
    (VLMo's of a layer share one); the table of words' displacements is as long as the texts.

    Source: Bao et al. 2022, arXiv:2111.02358; microsoft/unilm vlmo/modules/vlmo_module.py,
    multiway_transformer.py, config.py.
    """
    base = size == "base"
    shape, image_size, patch_size, (_, text, fusion) = (
        ({"dim": 768, "heads": 12}, 224, 16, (0, 6, 6)) if base else compact(size)
    )
    return ModelConfig(
        "vlmo",
        size,
        image_size=image_size,
        embed_dim=768 if base else COMPACT[size]["embed_dim"],
        vision=VisionConfig(**shape, depth=0, patch_size=patch_size, position="none"),
        text=TextConfig(
            **shape,
            depth=0,
            vocab_size=30522 if base else 4096,
            context_length=196 if base else 77,
            pool="first",
            embed_norm=True,
            norm_eps=1e-12,
            token_types=2,
            position="none",
        ),
        fusion=FusionConfig(
            **shape,
            depth=text + fusion,
            kind="concat",
            modality_types=True,
            pooler=True,
            experts="mome",
            joint_experts=2 if base else 1,
            order="image",
            relative_bias=True,
            key_bias=False,
            layer_scale=0.1,
        ),
        codes=8192 if base else 256,
        joint_embedding=True,
        mlm_head=True,
        mlm_tied=False,
        image_mean=_HALF,
        image_std=_HALF,
    )
