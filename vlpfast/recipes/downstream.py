"""Fine-tuning for questions: VQA, sentences about an image, sentences about two images. Each goes
on from a pre-training run, `train.init`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.train.config import RunConfig

Task = Literal["vqa", "entailment", "nlvr"]
# By which a recipe of the task is named.
SUFFIXES = {"vqa": "vqa", "entailment": "ve", "nlvr": "nlvr"}
# How many answers there are, at most; of VQA those that at least nine questions have are fewer.
_ANSWERS = {"vqa": 3129, "entailment": 3, "nlvr": 2}
_LEAST = {"vqa": 9, "entailment": 1, "nlvr": 1}


def finetune(
    config: RunConfig, task: Task, *, lr: float, head: float, warmup: int, **train: float
) -> RunConfig:
    """The pre-training run `config` made a fine-tuning run for `task`: without the heads of
    pre-training, on the answers alone, the answer head at `head` times the rate `lr`.

    VQA learns the scores of all that people said, the others one answer. `train` are fields of
    `TrainConfig`, among them how long.
    """
    targets = "scores" if task == "vqa" else "one"
    return replace(
        config,
        name=f"{config.name}_{SUFFIXES[task]}",
        model=replace(config.model, mlm_head=False, match_head=False, embed_dim=0),
        objectives=ObjectivesConfig(itc=0.0, qa=1.0, qa_targets=targets),
        data=replace(
            config.data,
            tasks=(task,),
            answers=_ANSWERS[task],
            answers_at_least=_LEAST[task],
            captions=(),
        ),
        optim=replace(config.optim, lr=lr, warmup=warmup, lr_multipliers=(("answer_head", head),)),
        train=replace(config.train, **({"steps": 0, "epochs": 0} | train)),
    )
