"""The tasks by their names: what each needs of a model, and how its measurement is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vlpfast.data import augment
from vlpfast.data.classes import open_classes
from vlpfast.data.prompts import TASKS as PROMPTS
from vlpfast.eval.align import align_probe
from vlpfast.eval.boxes import box_probe
from vlpfast.eval.caption import caption_probe
from vlpfast.eval.classify import classify_probe
from vlpfast.eval.codes import codes_probe, image_probe, linear_probe, mim_probe
from vlpfast.eval.evaluation import Evaluation
from vlpfast.eval.noise import noise_probe
from vlpfast.eval.pairs import check_metric, metrics_of
from vlpfast.eval.probe import mlm_probe, swap_probe
from vlpfast.eval.rank import retrieval
from vlpfast.eval.report import EvalResult
from vlpfast.eval.vqa import vqa_probe
from vlpfast.models.presets import missing
from vlpfast.models.vlp import VLPModel
from vlpfast.objectives.guide import Guide


def mlm(on: Evaluation) -> EvalResult:
    """Masked words told with and without their image."""
    return mlm_probe(on.model, on.batches("mlm"), on.tokenizer, seed=on.options.seed)


def swap(on: Evaluation) -> EvalResult:
    """Captions told from copies with attributes swapped."""
    return swap_probe(
        on.model,
        on.batches("swap"),
        on.index,
        on.tokenizer,
        max_tokens=on.data.max_tokens,
    )


def align(on: Evaluation) -> EvalResult:
    """Words and the regions that they are of, by transport."""
    parts = on.model.config.parts
    if on.model.config.vision.front != "regions" or "fused image tokens" not in parts:
        raise ValueError(
            "align needs a model that reads regions beside words, as 'uniter'; "
            f"preset {on.model.config.preset!r} does not"
        )
    return align_probe(on.model, on.batches("align"), on.index, on.tokenizer)


def classify(on: Evaluation) -> EvalResult:
    """Classes of images, by their names."""
    model, key = on.model, on.options.classes or on.data.classes
    if not model.has_joint_space:
        raise ValueError(
            "classify compares images with class names in a joint space; "
            f"{missing(model.config.preset, 'a joint space')}"
        )
    if not key:
        raise ValueError("classify needs class names: set classes")
    result = classify_probe(
        model,
        on.batches("classify"),
        on.index,
        open_classes(on.index, key),
        on.tokenizer,
        max_tokens=on.data.max_tokens,
    )
    return replace(result, info={"classes": key})


def caption(on: Evaluation) -> EvalResult:
    """Captions that are written, compared with those of the data."""
    options, index = on.options, on.index
    places = options.captions or on.data.captions

    def captions(sample: int) -> list[str]:
        every = index.captions(sample)
        return [every[n] for n in places if n < len(every)] or every

    result = caption_probe(
        on.model,
        on.batches("caption"),
        captions,
        on.tokenizer,
        max_tokens=min(on.data.max_tokens, on.model.config.text.context_length),
        num_beams=options.num_beams,
        prompt=PROMPTS["caption"][1] if on.data.tasks else "",
        seed=options.seed,
    )
    return replace(result, info=result.info | options.protocol)


def vqa(on: Evaluation) -> EvalResult:
    """Answers to questions, written or chosen among the run's."""
    return _answered(on, "vqa")


def entailment(on: Evaluation) -> EvalResult:
    """Whether a sentence follows from the image, as SNLI-VE asks."""
    return _answered(on, "entailment")


def nlvr(on: Evaluation) -> EvalResult:
    """Whether a sentence holds of two images, as NLVR2 asks."""
    return _answered(on, "nlvr")


def _answered(on: Evaluation, task: str) -> EvalResult:
    config = on.model.config
    chooses = "an answer head" in config.parts
    if not (chooses or config.takes_prompts):
        raise ValueError(
            f"{task} needs a model that writes after a prompt, as 'metalm', or one trained with "
            f"objectives.qa on data.answers, as any with fusion; {config.preset!r} is neither"
        )
    about, shown = config.answer_images if chooses else 1, 1 + on.index.has_pairs
    if about != shown:
        raise ValueError(
            f"{task}: the model answers questions about {about} of the data's images at once, "
            f"and they are about {shown}"
        )
    if chooses and len(on.answers) != config.answers:
        raise ValueError(
            f"{task}: the model tells {config.answers} answers by number, and names of "
            f"{len(on.answers)} are known: give those of the run's answers.json"
        )
    return vqa_probe(
        on.model,
        on.batches(task),
        on.index,
        on.tokenizer,
        max_tokens=on.data.max_tokens,
        task=task,
        names=on.answers,
        seed=on.options.seed,
    )


def box(on: Evaluation) -> EvalResult:
    """Where an object is, told in location tokens."""
    on.need("box", "a prompt encoder")

    def crops(samples: Tensor) -> np.ndarray:
        sides = [on.index.at(name, samples.numpy()) for name in ("width", "height")]
        return augment.shown_parts(augment.eval_boxes(*sides, on.data.eval_crop), *sides)

    return box_probe(
        on.model,
        on.batches("box"),
        on.index,
        on.tokenizer,
        crops=crops,
        max_tokens=on.data.max_tokens,
        seed=on.options.seed,
    )


def image(on: Evaluation) -> EvalResult:
    """An image's codes, told from its caption."""
    on.need("image", "image codes in its vocabulary")
    if on.objectives is None or "image" not in on.data.tasks:
        raise ValueError("image tells a tokenizer's codes: the model was trained on none")
    guide = Guide.open(on.objectives, on.device, draws=True)
    first = on.model.config.text.vocab_size
    batches = (
        guide.fill(batch.to(on.device), first_code=first)
        for batch in on.batches("image", guide.num_codes)
    )
    return image_probe(on.model, batches, seed=on.options.seed)


def codes(on: Evaluation) -> EvalResult:
    """How a tokenizer uses its codes."""
    on.need("codes", "a codebook")
    return codes_probe(on.model, on.batches("codes"))


def mim(on: Evaluation) -> EvalResult:
    """Codes of hidden patches."""
    on.need("mim", "a code head")
    if on.objectives is None or not on.objectives.mim:
        raise ValueError("mim tells a tokenizer's codes: the model was trained on none")
    guide = Guide.open(on.objectives, on.device).model
    options = {"probability": on.objectives.mim_probability, "seed": on.options.seed}
    return mim_probe(on.model, on.batches("mim"), guide, **options)


def noise(on: Evaluation) -> EvalResult:
    """Pairs that belong together told from noisy ones."""
    metrics = metrics_of(on.model.config, on.objectives)
    if not metrics:
        check_metric("similarity", on.model.config)
    return noise_probe(
        on.model,
        metrics,
        on.batches("noise"),
        on.index,
        on.index.tokens(on.tokenizer, on.data.max_tokens),
        captions=on.options.captions or on.data.captions,
        pairs_per_call=on.options.pairs_per_call,
    )


def linear(on: Evaluation) -> EvalResult:
    """A linear classifier on patches, beside that of a model that has learned nothing."""
    config = on.model.config
    if config.vision.front != "patches":
        raise ValueError(
            f"linear reads patches; preset {config.preset!r} has vision.front "
            f"{config.vision.front!r}"
        )
    with torch.random.fork_rng(), torch.inference_mode(False):
        torch.manual_seed(on.options.seed)
        control = VLPModel(config).to(on.device).eval()
    return linear_probe(on.model, control, on.batches("linear"), on.index)


# In the order of the help text.
TASKS: dict[str, Callable[[Evaluation], EvalResult]] = {
    "retrieval": retrieval,
    "mlm": mlm,
    "swap": swap,
    "align": align,
    "caption": caption,
    "vqa": vqa,
    "entailment": entailment,
    "nlvr": nlvr,
    "box": box,
    "image": image,
    "classify": classify,
    "noise": noise,
    "codes": codes,
    "mim": mim,
    "linear": linear,
}


def find(task: str) -> Callable[[Evaluation], EvalResult]:
    """The task of that name.

    Raises:
        ValueError: there is none.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; tasks are {', '.join(TASKS)}")
    return TASKS[task]
