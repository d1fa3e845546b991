"""BEiT-3: what is masked is predicted, of images, of texts and of pairs, by one stack of experts;
set `objectives.guide` to the run of a tokenizer (`vqkd_...`) of the same patches.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlpfast.data.config import DataConfig
from vlpfast.models.config import ModelConfig
from vlpfast.models.presets import preset_config
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.recipes import clip
from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig

# Half of the words are masked where the image can be seen, 15 % where it cannot.
_WORDS = ObjectivesConfig(itc=0.0, mlm=1.0, mtm=1.0, mlm_probability=0.5, mtm_probability=0.15)
OBJECTIVES = replace(_WORDS, mim=1.0, mvm=1.0, mim_probability=0.4)


def _pretraining(size: str, **text) -> dict:
    """Model and objectives of pre-training: no joint space."""
    return {
        "model": preset_config("beit3", size, embed_dim=0, **text),
        "objectives": OBJECTIVES,
    }


def _drop_paths(model: ModelConfig, rate: float) -> ModelConfig:
    return replace(model, fusion=replace(model.fusion, drop_path_rate=rate))


def compact(size: str) -> RunConfig:
    """`tiny` or `small`, for data sets of thousands of pairs on a CPU or one GPU."""
    config = clip.compact(size)
    return replace(
        config,
        name=f"beit3_{size}",
        **_pretraining(size, context_length=64),
        optim=OptimConfig(lr=5e-4, wd=0.05, beta2=0.98, eps=1e-6, warmup=200, grad_clip_norm=3.0),
        train=replace(config.train, batch_size=128),
    )


def scenes(*, steps: int = 1150) -> RunConfig:
    """`tiny`, 128 wide, on the embedded data: minutes on one core."""
    config = compact("tiny")
    parts = _pretraining("tiny", context_length=64, vocab_size=512)
    return replace(
        config,
        name="beit3_scenes",
        model=clip.narrow(parts["model"]),
        objectives=clip.mostly_words(OBJECTIVES, OBJECTIVES.mlm_probability),
        data=clip.SCENES_IN_FULL,
        optim=replace(config.optim, lr=1.5e-3, warmup=100),
        train=replace(config.train, batch_size=32, steps=steps, precision="amp_bf16", threads=1),
    )


def scenes_words(*, steps: int = 700) -> RunConfig:
    """`scenes` without masked images, and so without a tokenizer."""
    config = scenes(steps=steps)
    return replace(
        config,
        name="beit3_scenes_words",
        model=replace(config.model, codes=0),
        objectives=clip.mostly_words(_WORDS, _WORDS.mlm_probability),
    )


def scenes_retrieval(*, steps: int = 700) -> RunConfig:
    """Contrast of the same stack's two modalities, as BEiT-3 is tuned for retrieval."""
    config = scenes(steps=steps)
    model = preset_config(
        "beit3", "tiny", context_length=64, vocab_size=512, mlm_head=False, codes=0
    )
    return replace(
        config,
        name="beit3_scenes_retrieval",
        model=clip.narrow(model),
        objectives=ObjectivesConfig(itc=1.0),
        data=clip.SCENES_DATA,
        train=replace(config.train, batch_size=64),
    )


def base() -> RunConfig:
    """The published pre-training: a million steps of 6,144 samples, a third of each kind: pairs,
    images, texts.

    Source: Wang et al. 2022, arXiv:2208.10442, section 2.3 and table 11; no pre-training code was
    published. Here images, texts and pairs all come from the pairs.
    """
    parts = _pretraining("base")
    return RunConfig(
        name="beit3_base",
        **parts | {"model": _drop_paths(parts["model"], 0.1)},
        data=DataConfig(path="", max_tokens=64, vocab_size=64010, crop_scale=(0.5, 1.0), hflip=0.5),
        optim=OptimConfig(
            lr=1e-3, wd=0.05, beta2=0.98, eps=1e-6, warmup=10_000, grad_clip_norm=3.0
        ),
        train=TrainConfig(batch_size=64, steps=1_000_000, precision="amp_bf16"),
    )


def base_captioning() -> RunConfig:
    """Masked-LM captioning on COCO: 60 % of the words, a word seeing its image and earlier words.

    Source: microsoft/unilm beit3/get_started/get_started_for_captioning.md, which hides 70 %; 60 %
    is run_beit3_finetuning.py's default.
    """
    config = base()
    return replace(
        config,
        name="beit3_base_captioning",
        model=replace(config.model, image_size=480, codes=0),
        objectives=ObjectivesConfig(itc=0.0, mlm=1.0, mlm_causal=True, mlm_probability=0.6),
        data=replace(config.data, max_tokens=32),
        optim=replace(config.optim, lr=4e-5, beta2=0.999, eps=1e-8, warmup=1000),
        train=TrainConfig(batch_size=32, epochs=10, precision="amp_bf16"),
    )


def base_retrieval() -> RunConfig:
    """Contrast for retrieval on COCO, 15 epochs of batches of 3,072.

    Source: microsoft/unilm beit3/get_started/get_started_for_retrieval.md; there, the rate falls by
    0.65 with each layer below the last.
    """
    config = base()
    return replace(
        config,
        name="beit3_base_retrieval",
        model=_drop_paths(
            preset_config("beit3", "base", image_size=384, mlm_head=False, codes=0), 0.2
        ),
        objectives=ObjectivesConfig(itc=1.0),
        optim=replace(config.optim, lr=2e-4, beta2=0.999, eps=1e-8, warmup=500),
        train=TrainConfig(batch_size=192, epochs=15, precision="amp_bf16"),
    )


RECIPES = {
    "tiny": partial(compact, "tiny"),
    "small": partial(compact, "small"),
    "base": base,
    "base_captioning": base_captioning,
    "base_retrieval": base_retrieval,
    "scenes": scenes,
    "scenes_words": scenes_words,
    "scenes_retrieval": scenes_retrieval,
}
