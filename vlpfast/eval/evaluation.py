"""What every task has: a model, a data set, how it is read, and the options of the command line."""

from __future__ import annotations

import contextlib
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from vlpfast.data.batch import Batch
from vlpfast.data.config import DataConfig
from vlpfast.data.index import Index
from vlpfast.data.loader import make_loader
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.eval.retrieval import PoolTexts
from vlpfast.models.presets import missing
from vlpfast.models.vlp import VLPModel
from vlpfast.objectives.config import ObjectivesConfig


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


class Evaluation:
    """One model on one data set; `corrupt` has the samples that cannot be read, with reasons."""

    def __init__(
        self,
        model: VLPModel,
        index: Index,
        tokenizer: Tokenizer,
        data: DataConfig,
        options: EvalOptions,
        objectives: ObjectivesConfig | None,
        answers: tuple[str, ...] = (),
    ) -> None:
        if options.max_samples:
            index = replace(index, rows=np.asarray(index.rows)[: options.max_samples])
        self.model, self.index, self.tokenizer = model, index, tokenizer
        self.data, self.options, self.objectives = data, options, objectives
        self.device, self.answers = model.device, answers
        self.corrupt: dict[str, str] = {}

    def need(self, task: str, part: str) -> None:
        """Raises ValueError where the model has not the part (of `ModelConfig.parts`)."""
        preset = self.model.config.preset
        if part not in self.model.config.parts:
            raise ValueError(f"{task} needs {part}; {missing(preset, part)}")

    def batches(self, what: str, num_codes: int = 0) -> Iterator[Batch]:
        """One pass over the images; with `num_codes` their captions ask for so many codes."""
        tasks = ("image",) if num_codes else tuple(t for t in self.data.tasks if t != "image")
        loader = make_loader(
            self.index,
            replace(self.data, tasks=tasks, answers=0, questions=1),
            tokenizer=self.tokenizer,
            image_size=self.model.config.image_size,
            batch_size=self.options.batch_size,
            seed=self.options.seed,
            train=False,
            num_codes=num_codes,
        )
        with contextlib.closing(loader), self.bar(what, len(self.index), "img") as bar:
            for batch in loader:
                if len(batch):
                    yield batch
                bar.update(len(batch))
            self.corrupt |= loader.corrupt

    def bar(self, what: str, total: int, unit: str) -> tqdm:
        """Progress over `total` units, where the terminal can show it."""
        hidden = not (self.options.progress and sys.stderr.isatty())
        return tqdm(desc=what, total=total, unit=unit, disable=hidden, leave=False)
