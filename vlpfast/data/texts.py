"""The texts of a batch: captions, what is asked with its answers as labels, or prompts with the
texts that answer them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vlpfast.data import augment
from vlpfast.data.answers import config_answers, question
from vlpfast.data.config import DataConfig
from vlpfast.data.index import Index
from vlpfast.data.locations import Box
from vlpfast.data.prompts import choose, needs_captions
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.ragged import Ragged

if TYPE_CHECKING:
    from vlpfast.data.loader_torch import Draws


class Asked(NamedTuple):
    """What one sample is asked: example `number`, counted around, of `task` in its record, of the
    part `crop` of its image.
    """

    record: dict
    caption: str
    task: str
    number: int
    crop: Box


class Texts:
    """Texts of an index, as `config.tasks` and `config.answers` say.

    Args:
        train: each sample is asked one of all examples of one of the tasks, drawn by (seed,
            position); else the first of the first task.
        num_codes: of an image, for the task "image".
    """

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        train: bool,
        seed: int,
        num_codes: int,
    ) -> None:
        if "image" in config.tasks and not num_codes:
            raise ValueError("data.tasks 'image' needs the number of an image's codes: num_codes")
        self.index, self.config, self.tokenizer = index, config, tokenizer
        self.train, self.seed, self.num_codes = train, seed, num_codes
        self.questions = config.questions if train else 1
        self._answers = config_answers(index, config)
        self._tokens = index.tokens(tokenizer, config.max_tokens)

    def of(self, draws: Draws) -> tuple[Ragged, dict[str, Ragged | Tensor | None]]:
        """Packed tokens of the texts, `questions` of each sample after another, and what belongs to
        them in a batch: prompts, or answers.

        Raises:
            ValueError: a sample has no caption, and nothing else that could be its text.
        """
        if needs_captions(self.config.tasks) and (draws.captions < 0).any():
            name = self.index.name(int(draws.samples[draws.captions < 0][0]))
            raise ValueError(f"{name} has no caption: it cannot be loaded as an image-text pair")
        if not self.config.tasks:
            return self._tokens.ragged(draws.captions), {}
        asked = self._asked(draws)
        return self._questions(asked) if self.config.answers else self._answered(asked)

    def _questions(self, asked: list[Asked]) -> tuple[Ragged, dict[str, Ragged | Tensor]]:
        """What is asked, as texts, captions as they are; and the answers' numbers and scores."""
        pairs = [question(a.record, a.caption, a.task, a.number) for a in asked]
        texts, said = zip(*pairs, strict=True) if pairs else ((), ())
        # The first is the most frequent.
        labels = [self._answers.get(next(iter(found), None), -100) for found in said]
        known = [{a: s for a, s in found.items() if a in self._answers} for found in said]
        encoded = Ragged.from_lists(self.tokenizer.encode(list(texts), self.config.max_tokens))
        return encoded, {
            "answer_ids": torch.tensor(labels, dtype=torch.int64),
            "answer_sets": Ragged.from_lists([[self._answers[a] for a in f] for f in known]),
            "answer_scores": torch.tensor([s for f in known for s in f.values()]),
        }

    def _answered(self, asked: list[Asked]) -> tuple[Ragged, dict[str, Ragged | Tensor | None]]:
        """Texts that answer, those that are to become codes of padding; and prompts."""
        num_bins = len(self.tokenizer.locations)
        pairs = [
            choose(a.record, a.caption, a.task, a.number, num_bins=num_bins, crop=a.crop)
            for a in asked
        ]
        tasks = [a.task for a in asked]
        encoded = self.tokenizer.encode(
            [part for pair in pairs for part in pair], self.config.max_tokens
        )
        prompts, texts = encoded[::2], encoded[1::2]
        drawn = [row for row, task in enumerate(tasks) if task == "image"]
        for row in drawn:
            codes = [self.tokenizer.pad_id] * self.num_codes
            texts[row] = [self.tokenizer.start_id, *codes, self.tokenizer.end_id]
        rows = torch.tensor(drawn, dtype=torch.int64) if "image" in self.config.tasks else None
        return Ragged.from_lists(texts), {"prompt": Ragged.from_lists(prompts), "drawn": rows}

    def _asked(self, draws: Draws) -> list[Asked]:
        """What each sample is asked."""
        tasks, positions = self.config.tasks, torch.from_numpy(draws.positions)
        chosen = number = torch.zeros_like(positions)
        if self.train:
            chosen = augment.integers(self.seed, positions, augment.TASK, len(tasks))
            number = augment.integers(self.seed, positions, augment.TASK + 1, 1 << 16)
        captions = self.index.strings["captions"]
        sides = [self.index.at(name, draws.samples) for name in ("width", "height")]
        crops = augment.shown_parts(draws.boxes, *sides)
        names = [tasks[t] for t in chosen.tolist()]
        columns = (draws.samples, draws.captions, number, crops)
        asked = []
        for name, i, c, n, crop in zip(names, *(col.tolist() for col in columns), strict=True):
            record, caption = self.index.record(i), captions[c].decode() if c >= 0 else ""
            numbers = range(n, n + self.questions)
            asked += [Asked(record, caption, name, number, crop) for number in numbers]
        return asked
