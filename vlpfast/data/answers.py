"""The answers of an index's questions: how they are written, numbered and scored."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping

from vlpfast.data.build import atomic
from vlpfast.data.config import DataConfig
from vlpfast.data.index import Index
from vlpfast.data.prompts import ANSWER, TASKS, asked, check_caption, examples, spoken

# By how many of ten people gave it: UNITER's, ViLT's and METER's rounding of 0.3 each.
_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)
# Of fewer answers than this each is right: they are no poll.
_FEW = 4
_PUNCTUATION = ";:/'[]\"()=+\\_><@`,?"
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS.split())}
_ARTICLES = ("a", "an", "the")
# What stands before a lost apostrophe, by what stands behind it.
_CONTRACTED = {
    "t": "ain aren can couldn didn doesn don hadn hasn haven isn mightn mustn needn oughtn shan "
    "shouldn wasn weren won wouldn",
    "ve": "could i might must not should they we what would you",
    "d": "he how i they where who you",
    "ll": "how it that they what who you",
    "re": "they there what why you",
    "s": "he how let she somebody someone that there what when where who",
    "m": "i",
}
_CONTRACTIONS = {
    stem + end: f"{stem}'{end}" for end, stems in _CONTRACTED.items() for stem in stems.split()
}


def normalize(answer: str) -> str:
    """An answer as VQA compares it: lower case, numbers as digits, no articles, no punctuation, and
    the apostrophes of contractions.

    A mark that touches a space is left out, one between letters becomes a space; where a comma
    stands between digits every mark is left out; a period stays before a digit alone.

    Source: visualqa.org/evaluation.html; GT-Vision-Lab/VQA PythonEvaluationTools vqaEval.py.
        Deviation: contractions with two apostrophes are left as they are.
    """
    text = found = " ".join(answer.split())
    grouped = re.search(r"\d,\d", found) is not None
    for mark in _PUNCTUATION:
        apart = f"{mark} " in found or f" {mark}" in found or grouped
        text = text.replace(mark, "" if apart else " ")
    words = re.sub(r"\.(?!\d)", "", text).lower().split()
    words = (_NUMBERS.get(word, word) for word in words)
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def scores(answer: object) -> dict[str, float]:
    """Normalised answers and how right each is, what a model is trained towards, most frequent
    first: of what ten people said 0.3, 0.6, 0.9, 1 for one, two, three and more who did.

    Args:
        answer: one, a list of what several people said, or a mapping to scores in [0, 1].
    """
    return _weigh(answer, lambda count, of: _SCORES[min(count, len(_SCORES) - 1)])


def accuracies(answer: object) -> dict[str, float]:
    """Normalised answers and their accuracy, what a model is measured by: min(people / 3, 1) of
    nine of the ten people, averaged over who is left out.

    Args: as `scores`.

    Source: Antol et al. 2015 (VQA), section 4, arXiv:1505.00468; visualqa.org/evaluation.html.
    """

    def agreed(count: int, of: int) -> float:
        without = count * min((count - 1) / 3, 1.0)
        return (without + (of - count) * min(count / 3, 1.0)) / of

    return _weigh(answer, agreed)


def _weigh(answer: object, weight: Callable[[int, int], float]) -> dict[str, float]:
    """Of what several people said by `weight` of (how many said this, how many there are)."""
    if isinstance(answer, Mapping):
        found: dict[str, float] = {}
        for name, score in sorted(answer.items(), key=lambda item: -item[1]):
            if not 0 <= score <= 1:
                raise ValueError(f"answer {name!r}: the score must be in [0, 1], got {score}")
            found.setdefault(normalize(name), float(score))
        return found
    said = answer if isinstance(answer, list) else [spoken(answer)]
    counts = Counter(normalize(one) for one in said if one)
    few = counts.total() < _FEW
    return {a: 1.0 if few else weight(n, counts.total()) for a, n in counts.most_common()}


def question(record: dict, caption: str, task: str, number: int) -> tuple[str, dict[str, float]]:
    """What example `number`, counted around, of a record asks, and the scores of its answers; the
    caption, without answers, where it has none or `task` is "caption".
    """
    found = asked(record, task) if task != "caption" else []
    if not found:
        check_caption(record, caption, task)
        return caption, {}
    example = found[number % len(found)]
    return TASKS[task][1].format(**example), scores(example.get(ANSWER[task][1]))


def open_answers(
    index: Index, tasks: tuple[str, ...], most: int, at_least: int = 1
) -> dict[str, int]:
    """Numbers of the `most` most frequent answers to what `tasks` ask, of those that are the answer
    of `at_least` questions; counted once and kept beside the index's tables. Of equally frequent
    ones the first in the alphabet comes first; of what several people said, the most frequent
    counts.

    Raises:
        ValueError: a record has no such field, or no question has an answer.
    """
    stem = hashlib.sha256(json.dumps(tasks).encode()).hexdigest()[:16]
    path = index.folder / f"answer-counts-{stem}.json"
    if not path.exists():
        wanted = [task for task in tasks if task != "caption"]
        counts = Counter(
            normalize(answer)
            for record in map(json.loads, index.strings["records"])
            for task in wanted
            for _, answer in examples(record, task)
            if answer
        )
        with atomic(path) as temporary:
            ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            temporary.write_text(json.dumps(ordered))
    found = [name for name, count in json.loads(path.read_text()) if count >= at_least]
    if not found:
        raise ValueError(f"{index.source}: no answer to what {list(tasks)} ask is that frequent")
    return {name: number for number, name in enumerate(found[:most])}


def config_answers(index: Index, config: DataConfig) -> dict[str, int]:
    """Numbers of the answers of `config`; empty where it has none."""
    if not config.answers:
        return {}
    return open_answers(index, config.tasks, config.answers, config.answers_at_least)
