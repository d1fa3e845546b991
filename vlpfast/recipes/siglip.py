"""SigLIP: contrast of every pair by itself, with a learned bias."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from vlpfast.data.config import DataConfig
from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.recipes import clip
from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig

_OBJECTIVES = ObjectivesConfig(itc=0.0, sigmoid=1.0)


def compact(size: str) -> RunConfig:
    """`tiny` or `small`, for data sets of thousands of pairs on a CPU or one GPU."""
    config = clip.compact(size)
    bias = _log_odds(config.train.batch_size)
    return replace(
        config,
        name=f"siglip_{size}",
        model=preset_config("siglip", size, context_length=64, logit_bias_init=bias),
        objectives=_OBJECTIVES,
    )


def _log_odds(batch_size: int) -> float:
    """Of a match, where the bias begins: -10 is for the tens of thousands of pairs of the published
    batches. Where it is far off, all embeddings first move together to make up for it.
    """
    return -math.log(batch_size - 1)


def scenes(*, steps: int = 250) -> RunConfig:
    """`tiny`, 128 wide, on the embedded data: minutes on one core."""
    config = clip.scenes(compact("tiny"), "siglip_scenes", steps=steps)
    bias = _log_odds(config.train.batch_size)
    model = clip.narrow(config.model, embed_dim=128, logit_bias_init=bias)
    return replace(config, model=model)


def base() -> RunConfig:
    """ViT-B/16 on 32 devices of 1,024 pairs.

    Source: Zhai et al. 2023, arXiv:2303.15343, section 4 (batch, rate, decay, beta2); its optimizer
    is a factored Adam, and its text goes through a SentencePiece vocabulary of 32,000.
    """
    return RunConfig(
        name="siglip_base",
        model=preset_config("siglip", "base"),
        objectives=_OBJECTIVES,
        data=DataConfig(path="", max_tokens=64, vocab_size=32000, crop_scale=(0.9, 1.0)),
        optim=OptimConfig(
            lr=1e-3, wd=1e-4, beta2=0.95, eps=1e-8, warmup=20_000, grad_clip_norm=1.0
        ),
        train=TrainConfig(batch_size=1024, steps=1_220_000, precision="amp_bf16"),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "scenes": scenes,
}
