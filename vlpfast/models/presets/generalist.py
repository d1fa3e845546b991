"""One model for many tasks: everything is similarity, or everything is text."""

from __future__ import annotations

from dataclasses import replace

from vlpfast.models.config import FusionConfig, ModelConfig, TextConfig, VisionConfig
from vlpfast.models.presets.sizes import COMPACT, compact


def uni_perceiver(size: str) -> ModelConfig:
    """Uni-Perceiver: one pre-norm stack encodes images, texts, both and the words and class names
    with which they are compared; a learned temperature per task. Base is ViT-B/16 at 224 px.

    Deviations: no LayerScale, no stochastic depth, no video; embeddings of images and of texts have
    a LayerNorm each; a word is asked for by the output of the word before it, not by a second
    stream of start tokens; the vocabulary is this library's BPE of the published size.

    Source: Zhu et al. 2022, arXiv:2112.01522; fundamentalvision/Uni-Perceiver
        configs/BERT_L12_H768_experiments/16tasks_training_basedense_stage2_64gpu.yaml.
    """
    base = size == "base"
    if base:
        shape, image_size, patch_size, depth = {"dim": 768, "heads": 12}, 224, 16, 12
    else:
        shape, image_size, patch_size, (_, text_depth, fusion_depth) = compact(size)
        depth = text_depth + fusion_depth
    tokens = {**shape, "depth": 0, "embed_norm": True}
    return ModelConfig(
        "uni-perceiver",
        size,
        image_size=image_size,
        embed_dim=768 if base else COMPACT[size]["embed_dim"],
        vision=VisionConfig(
            **tokens, patch_size=patch_size, position="sincos", class_token=False, pool="mean"
        ),
        text=TextConfig(
            **tokens,
            pool="first",
            token_types=1,
            vocab_size=49408 if base else 4096,
            context_length=512 if base else 77,
        ),
        fusion=FusionConfig(**shape, depth=depth, kind="shared"),
        match_head=False,
        task_scales=("mlm", "lm", "classify"),
    )


def uni_perceiver_moe(size: str) -> ModelConfig:
    """Uni-Perceiver-MoE: of every second block, MLP and attention projections are 8 experts, two of
    which a token gets by its attributes.

    Source: Zhu et al. 2022, arXiv:2206.04674; fundamentalvision/Uni-Perceiver
        configs/BERT_L12_H768_experiments/16tasks_training_basemoe_stage2_56gpu.yaml.
    """
    config = uni_perceiver(size)
    experts = replace(config.fusion, moe_experts=8, moe_top_k=2)
    return replace(config, preset="uni-perceiver-moe", fusion=experts)


def metalm(size: str) -> ModelConfig:
    """MetaLM: an image tower, a linear connector, a causal decoder in whose sequence the image's
    tokens and a prompt see themselves both ways.

    No code was published. Base is ViT-B/16 at 224 px and 12 decoder blocks of its width.

    Source: Hao et al. 2022, arXiv:2206.06336, section 2.
    """
    base = size == "base"
    if base:
        shape, image_size, patch_size = {"dim": 768, "heads": 12}, 224, 16
        vision = depth = 12
    else:
        shape, image_size, patch_size, (vision, text_depth, fusion_depth) = compact(size)
        depth = text_depth + fusion_depth
    return ModelConfig(
        "metalm",
        size,
        image_size=image_size,
        embed_dim=0,
        vision=VisionConfig(**shape, depth=vision, patch_size=patch_size),
        text=TextConfig(
            **shape,
            depth=0,
            vocab_size=50257 if base else 4096,
            context_length=512 if base else 77,
        ),
        fusion=FusionConfig(**shape, depth=depth, kind="prefix", causal=True),
        lm_head="linear",
        match_head=False,
    )
