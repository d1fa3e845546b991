"""Evaluates a model, or the newest weights of a run folder, on the tasks of `TASKS`."""

from __future__ import annotations

import contextlib
import sys
import time
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vlpfast.data import augment
from vlpfast.data.batch import Batch
from vlpfast.data.classes import open_classes
from vlpfast.data.config import DataConfig
from vlpfast.data.index import Index
from vlpfast.data.loader import make_loader, open_index
from vlpfast.data.prompts import TASKS as PROMPTS
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.eval.align import align_probe
from vlpfast.eval.boxes import box_probe
from vlpfast.eval.caption import caption_probe
from vlpfast.eval.classify import classify_probe
from vlpfast.eval.codes import codes_probe, image_probe, linear_probe, mim_probe
from vlpfast.eval.load import load_run
from vlpfast.eval.probe import mlm_probe, swap_probe
from vlpfast.eval.report import EvalResult, save_bars
from vlpfast.eval.rerank import rerank
from vlpfast.eval.retrieval import PoolTexts, recall_metrics, retrieval_ranks
from vlpfast.eval.vqa import vqa_probe
from vlpfast.models.presets import missing
from vlpfast.models.vlp import VLPModel
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.objectives.guide import Guide
from vlpfast.ragged import Ragged

TASKS = (
    "retrieval",
    "mlm",
    "swap",
    "align",
    "caption",
    "vqa",
    "box",
    "image",
    "classify",
    "codes",
    "mim",
    "linear",
)


@dataclass(frozen=True)
class EvalOptions:
    """How to evaluate.

    Attributes:
        rerank_k: candidates of each query that the matching head re-ranks; 0 is none.
        itc_weight: what the contrastive similarity adds to the matching score (BLIP: 1).
        pool_texts: "mean" makes one candidate of all texts of an id: scoring by concept.
        captions: places of the captions that retrieval uses of each sample; empty: all. What is
            written is compared with them; empty: with those that training draws from.
        num_beams: of the search for captions; 1 is greedy.
        classes: which class names `classify` chooses from, as `DataConfig.classes`; empty: the
            run's.
        batch_size: images encoded at once, and texts.
        pairs_per_call: image-text pairs matched at once.
        max_samples: the first so many samples of the data; 0 is all.
        seed: of masks and shuffled images.
        progress: show bars where the terminal can.
    """

    rerank_k: int = 0
    itc_weight: float = 0.0
    pool_texts: PoolTexts = "none"
    captions: tuple[int, ...] = ()
    num_beams: int = 1
    classes: str = ""
    batch_size: int = 128
    pairs_per_call: int = 512
    max_samples: int = 0
    seed: int = 0
    progress: bool = True

    @property
    def protocol(self) -> dict[str, str]:
        """The choices of candidates that are not the defaults, for the record."""
        chosen = {"pool_texts": self.pool_texts} if self.pool_texts != "none" else {}
        places = " ".join(map(str, self.captions))
        return chosen | ({"captions": places} if places else {})

    def __post_init__(self) -> None:
        for name, least in (
            ("rerank_k", 0),
            ("max_samples", 0),
            ("num_beams", 1),
            ("batch_size", 1),
            ("pairs_per_call", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.pool_texts not in typing.get_args(PoolTexts):
            raise ValueError(f"pool_texts must be 'none' or 'mean', got {self.pool_texts!r}")
        if self.rerank_k and self.pool_texts != "none":
            raise ValueError("rerank_k matches single captions: use it with pool_texts 'none'")


def evaluate(
    run_dir: str | Path,
    task: str,
    data: str | Path,
    *,
    where: Sequence[str] = (),
    id_key: str = "",
    weights: str = "latest",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    **options: object,
) -> EvalResult:
    """Evaluates a run and writes `RUN/eval/TASK-N.json` and a bar chart `RUN/eval/TASK-N.png`.

    Args:
        run_dir: folder with config.json, tokenizer.json and weights.
        task: one of `TASKS`.
        data: folder of shards, or a table, as in training.
        where: "field=value" conditions on the samples.
        id_key: record field that says which samples show the same; empty takes the run's.
        weights: "latest" checkpoint (else model.safetensors), or the path of either kind of file.
        device: "auto" is a GPU where there is one.
        options: fields of `EvalOptions`.
    """
    _check_task(task)
    settings = EvalOptions(**options)
    run = load_run(run_dir, weights=weights, device=device)
    config = replace(
        run.data, path=str(data), where=tuple(where), id_key=id_key or run.data.id_key, index_dir=""
    )
    index = open_index(config)
    result = evaluate_model(
        run.model,
        index,
        run.tokenizer,
        (task,),
        data=config,
        options=settings,
        objectives=run.objectives,
    )[task]
    info = {"run": str(run_dir), "weights": str(run.weights), "data": str(data)}
    info |= {"where": " ".join(where)} if where else {}
    result = replace(result, info=info | result.info)
    save(result, Path(run_dir) / "eval")
    return result


def evaluate_model(
    model: VLPModel,
    index: Index,
    tokenizer: Tokenizer,
    tasks: Sequence[str] = ("retrieval",),
    *,
    data: DataConfig,
    options: EvalOptions | None = None,
    objectives: ObjectivesConfig | None = None,
) -> dict[str, EvalResult]:
    """Evaluates a model that is in memory; leaves it in the mode (train or eval) it was in.

    Args:
        model: on the device to evaluate on.
        index: the samples.
        tokenizer: the model's.
        tasks: some of `TASKS`.
        data: how images are loaded and captions cut; its path and conditions are not read.
        options: `EvalOptions()` if None.
        objectives: what the model was trained on: `mim` reads which tokenizer's codes it learned.
    """
    for task in tasks:
        _check_task(task)
    evaluation = _Evaluation(model, index, tokenizer, data, options or EvalOptions(), objectives)
    results = {}
    with _evaluating(model):
        for task in tasks:
            started = time.monotonic()
            result = getattr(evaluation, task)()
            info = result.info | {"seconds": round(time.monotonic() - started, 2)}
            if evaluation.corrupt:
                info["corrupt"] = (
                    f"{len(evaluation.corrupt)} left out: {min(evaluation.corrupt)} .."
                )
            results[task] = replace(result, info=info)
    return results


def save(result: EvalResult, folder: Path) -> Path:
    """Writes `TASK-N.json` and `TASK-N.png`, N the next free number; returns the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while (path := folder / f"{result.task}-{number}.json").exists():
        number += 1
    path.write_text(result.to_json() + "\n")
    save_bars(result, path.with_suffix(".png"))
    return path


class _Evaluation:
    """One model on one data set; a method a task, under its name."""

    def __init__(
        self,
        model: VLPModel,
        index: Index,
        tokenizer: Tokenizer,
        data: DataConfig,
        options: EvalOptions,
        objectives: ObjectivesConfig | None,
    ) -> None:
        if options.max_samples:
            index = replace(index, rows=np.asarray(index.rows)[: options.max_samples])
        self.model, self.index, self.tokenizer = model, index, tokenizer
        self.data, self.options, self.objectives = data, options, objectives
        self.device = model.device
        self.corrupt: dict[str, str] = {}

    def retrieval(self) -> EvalResult:
        options, model = self.options, self.model
        if not model.has_joint_space:
            raise ValueError(
                "retrieval ranks by embeddings in a joint space; "
                f"{missing(model.config.preset, 'a joint space')}"
            )
        if options.rerank_k and not model.has_fusion:
            raise ValueError(
                f"rerank_k needs a fusion tower; preset {model.config.preset!r} has none"
            )
        image, image_ids, samples = self._images()
        captions, text_ids = self._captions(samples)
        text, tokens = self._texts(captions)
        image_ids, text_ids = image_ids.to(self.device), text_ids.to(self.device)
        ranks = retrieval_ranks(
            image, text, image_ids, text_ids, pool_texts=options.pool_texts, topk=options.rerank_k
        )
        metrics = recall_metrics(*ranks)
        info: dict[str, str | int | float] = {}
        if options.rerank_k:
            reranked = rerank(
                model,
                self._image_tokens(samples),
                tokens,
                image_ids,
                text_ids,
                *ranks,
                itc_weight=options.itc_weight,
                pairs_per_call=options.pairs_per_call,
            )
            metrics |= {f"itm_{name}": v for name, v in recall_metrics(*reranked).items()}
            info = {"rerank_k": options.rerank_k, "itc_weight": options.itc_weight}
        return EvalResult(
            "retrieval",
            metrics=metrics,
            chance=recall_metrics(*(r.chance() for r in ranks)),
            counts={
                "num_images": ranks[1].num_candidates,
                "num_texts": ranks[0].num_candidates,
                "num_ids": len(image_ids.unique()),
            },
            info=info | options.protocol,
        )

    def mlm(self) -> EvalResult:
        return mlm_probe(self.model, self._batches("mlm"), self.tokenizer, seed=self.options.seed)

    def swap(self) -> EvalResult:
        return swap_probe(
            self.model,
            self._batches("swap"),
            self.index,
            self.tokenizer,
            max_tokens=self.data.max_tokens,
        )

    def align(self) -> EvalResult:
        parts = self.model.config.parts
        if self.model.config.vision.front != "regions" or "fused image tokens" not in parts:
            raise ValueError(
                "align needs a model that reads regions beside words, as 'uniter'; "
                f"preset {self.model.config.preset!r} does not"
            )
        return align_probe(self.model, self._batches("align"), self.index, self.tokenizer)

    def classify(self) -> EvalResult:
        model, key = self.model, self.options.classes or self.data.classes
        if not model.has_joint_space:
            raise ValueError(
                "classify compares images with class names in a joint space; "
                f"{missing(model.config.preset, 'a joint space')}"
            )
        if not key:
            raise ValueError("classify needs class names: set classes")
        result = classify_probe(
            model,
            self._batches("classify"),
            self.index,
            open_classes(self.index, key),
            self.tokenizer,
            max_tokens=self.data.max_tokens,
        )
        return replace(result, info={"classes": key})

    def caption(self) -> EvalResult:
        options, index = self.options, self.index
        places = options.captions or self.data.captions

        def captions(sample: int) -> list[str]:
            every = index.captions(sample)
            return [every[n] for n in places if n < len(every)] or every

        result = caption_probe(
            self.model,
            self._batches("caption"),
            captions,
            self.tokenizer,
            max_tokens=min(self.data.max_tokens, self.model.config.text.context_length),
            num_beams=options.num_beams,
            prompt=PROMPTS["caption"][1] if self.data.tasks else "",
            seed=options.seed,
        )
        return replace(result, info=result.info | options.protocol)

    def vqa(self) -> EvalResult:
        config = self.model.config
        if not config.takes_prompts:
            raise ValueError(
                "vqa needs a model that writes after a prompt, as 'metalm'; preset "
                f"{config.preset!r} does not"
            )
        return vqa_probe(
            self.model,
            self._batches("vqa"),
            self.index,
            self.tokenizer,
            max_tokens=self.data.max_tokens,
            seed=self.options.seed,
        )

    def box(self) -> EvalResult:
        self._need("box", "a prompt encoder")

        def crops(samples: Tensor) -> np.ndarray:
            sides = [self.index.at(name, samples.numpy()) for name in ("width", "height")]
            return augment.shown_parts(augment.eval_boxes(*sides, self.data.eval_crop), *sides)

        return box_probe(
            self.model,
            self._batches("box"),
            self.index,
            self.tokenizer,
            crops=crops,
            max_tokens=self.data.max_tokens,
            seed=self.options.seed,
        )

    def image(self) -> EvalResult:
        self._need("image", "image codes in its vocabulary")
        if self.objectives is None or "image" not in self.data.tasks:
            raise ValueError("image tells a tokenizer's codes: the model was trained on none")
        guide = Guide.open(self.objectives, self.device, draws=True)
        first = self.model.config.text.vocab_size
        batches = (
            guide.fill(batch.to(self.device), first_code=first)
            for batch in self._batches("image", guide.num_codes)
        )
        return image_probe(self.model, batches, seed=self.options.seed)

    def codes(self) -> EvalResult:
        self._need("codes", "a codebook")
        return codes_probe(self.model, self._batches("codes"))

    def mim(self) -> EvalResult:
        self._need("mim", "a code head")
        if self.objectives is None or not self.objectives.mim:
            raise ValueError("mim tells a tokenizer's codes: the model was trained on none")
        guide = Guide.open(self.objectives, self.device).model
        options = {"probability": self.objectives.mim_probability, "seed": self.options.seed}
        return mim_probe(self.model, self._batches("mim"), guide, **options)

    def linear(self) -> EvalResult:
        config = self.model.config
        if config.vision.front != "patches":
            raise ValueError(
                f"linear reads patches; preset {config.preset!r} has vision.front "
                f"{config.vision.front!r}"
            )
        with torch.random.fork_rng(), torch.inference_mode(False):
            torch.manual_seed(self.options.seed)
            control = VLPModel(config).to(self.device).eval()
        return linear_probe(self.model, control, self._batches("linear"), self.index)

    def _need(self, task: str, part: str) -> None:
        preset = self.model.config.preset
        if part not in self.model.config.parts:
            raise ValueError(f"{task} needs {part}; {missing(preset, part)}")

    def _batches(self, what: str, num_codes: int = 0) -> Iterator[Batch]:
        """One pass over the images; with `num_codes` their captions ask for so many codes."""
        tasks = ("image",) if num_codes else tuple(t for t in self.data.tasks if t != "image")
        loader = make_loader(
            self.index,
            replace(self.data, tasks=tasks),
            tokenizer=self.tokenizer,
            image_size=self.model.config.image_size,
            batch_size=self.options.batch_size,
            seed=self.options.seed,
            train=False,
            num_codes=num_codes,
        )
        with contextlib.closing(loader), self._bar(what, len(self.index), "img") as bar:
            for batch in loader:
                if len(batch):
                    yield batch
                bar.update(len(batch))
            self.corrupt |= loader.corrupt

    def _images(self) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (I, E), image ids (I,) and sample ids (I,) of all images that can be read."""
        parts = [
            (
                self.model.encode_image(batch.images.to(self.device)).embedding,
                batch.image_ids.cpu(),
                batch.sample_ids.cpu(),
            )
            for batch in self._batches("images")
        ]
        if not parts:
            raise ValueError(f"{self.index.source}: no image can be read, nothing to evaluate")
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    def _image_tokens(self, samples: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, tokens) of the images, encoded anew: the tokens of all would not fit in memory."""
        row_of = torch.full((int(samples.max()) + 1,), -1)
        row_of[samples] = torch.arange(len(samples))
        for batch in self._batches("matching"):
            rows = row_of[batch.sample_ids.cpu()]
            images = batch.images.to(self.device)
            yield rows, self.model.encode_image(images, num_embedded=0).tokens

    def _captions(self, samples: Tensor) -> tuple[list[str], Tensor]:
        """The samples' captions and their ids; the same text for the same id counts once."""
        image_ids, places = self.index.image_ids, self.options.captions
        distinct = dict.fromkeys(
            (int(image_ids[i]), caption)
            for i in samples.tolist()
            for place, caption in enumerate(self.index.captions(i))
            if not places or place in places
        )
        if not distinct:
            raise ValueError(f"captions: no sample has a caption at any of the places {places}")
        ids, captions = zip(*distinct, strict=True)
        return list(captions), torch.tensor(ids)

    def _texts(self, captions: list[str]) -> tuple[Tensor, Ragged | None]:
        """Embeddings (T, E) of texts, and where re-ranking needs them their packed tokens."""
        size = self.options.batch_size
        embeddings, tokens = [], []
        with self._bar("texts", len(captions), "txt") as bar:
            for start in range(0, len(captions), size):
                chunk = captions[start : start + size]
                ids = self.tokenizer.encode(chunk, self.data.max_tokens)
                text = self.model.encode_text(Ragged.from_lists(ids, self.device))
                embeddings.append(text.embedding)
                if self.options.rerank_k:
                    tokens.append(text.tokens)
                bar.update(len(chunk))
        return torch.cat(embeddings), Ragged.cat(tokens) if tokens else None

    def _bar(self, what: str, total: int, unit: str) -> tqdm:
        hidden = not (self.options.progress and sys.stderr.isatty())
        return tqdm(desc=what, total=total, unit=unit, disable=hidden, leave=False)


@contextlib.contextmanager
def _evaluating(model: VLPModel) -> Iterator[None]:
    """Inside, the model is in eval mode and nothing is recorded for a backward."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; tasks are {', '.join(TASKS)}")
