"""ViLBERT: words and detected regions in two streams with co-attention; matching, masked words and
the classes of masked regions from one row of each pair.
"""

from __future__ import annotations

from functools import partial

from vlpfast.data.config import DataConfig
from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.recipes import clip, lxmert
from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig

OBJECTIVES = ObjectivesConfig(
    itc=0.0,
    itm=1.0,
    mlm=1.0,
    mrckl=1.0,
    itm_negatives="random",
    mrm_reduction="paper",
    masking="together",
)


def base() -> RunConfig:
    """The published pre-training on Conceptual Captions: 10 epochs in batches of 512 on 8 GPUs; a
    tenth of the 60,000 steps warms up, the rate then falls linearly (here by a cosine).

    Deviations: every hidden region's feature is zero (there 90 %), and what the matching head reads
    is not dropped out.

    Source: Lu et al. 2019, arXiv:1908.02265, sections 3.1 and 3.2.
    """
    return RunConfig(
        name="vilbert_base",
        model=preset_config("vilbert", "base"),
        objectives=OBJECTIVES,
        data=DataConfig(path="", regions="files", max_tokens=36, vocab_size=30522),
        optim=OptimConfig(lr=1e-4, wd=0.01, beta2=0.999, eps=1e-6, warmup=6000),
        train=TrainConfig(batch_size=64, epochs=10, precision="amp_bf16"),
    )


RECIPES = {
    "tiny": partial(lxmert.compact, "tiny", preset="vilbert", objectives=OBJECTIVES),
    "small": partial(lxmert.compact, "small", preset="vilbert", objectives=OBJECTIVES),
    "base": base,
    "scenes": partial(
        lxmert.scenes,
        preset="vilbert",
        objectives=OBJECTIVES,
        data=clip.SCENES_IN_FULL,
        steps=400,
    ),
}
