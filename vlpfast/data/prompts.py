"""Prompts and the texts that answer them: a caption, the answer to a question, whether a sentence
holds of an image or of two, where an object is and what is somewhere; from records of generated
scenes, or of any data with the same fields.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from vlpfast.data.locations import WHOLE, Box, named_objects, spell

if TYPE_CHECKING:
    from vlpfast.data.index import Index

# What is asked, of which field of a record, and the answer; "caption" and "image" are of captions.
# A record may also be one example itself, as in published data: with the fields of `ANSWER`.
# What answers "image" are the image's codes, which a tokenizer of images gives.
TASKS = {
    "caption": ("", "caption", "{caption}"),
    "vqa": ("questions", "{question}", "{answer}"),
    "entailment": ("entailment", "is it so? {sentence}", "{label}"),
    "nlvr": ("pairs", "{sentence}", "{label}"),
    # As allenai/unified-io-inference uio/runner.py asks, in lower case.
    "box": ("objects", 'which region does the text "{name}" describe?', "{place}"),
    "region": ("objects", 'what does the region "{place}" describe?', "{name}"),
    "image": ("", 'what is the complete image? text: "{caption}"', ""),
}
# Those that speak of places.
LOCATED = ("box", "region")
# Those that are right or wrong about images: what a record is asked, and where its answer is.
ANSWER = {
    "vqa": ("question", "answer"),
    "entailment": ("sentence", "label"),
    "nlvr": ("sentence", "label"),
}


def asked(record: dict, task: str) -> list[dict]:
    """The examples of `task`, one of `TASKS` that has a field, in a record.

    Raises:
        ValueError: it has no such field, and is no example itself.
    """
    field, own = TASKS[task][0], ANSWER.get(task, ("",))[0]
    if field in record:
        return record[field]
    if own in record:
        return [record]
    names = " or ".join(repr(name) for name in filter(None, (field, own)))
    raise ValueError(f"data.tasks {task!r}: no field {names}, found {sorted(record)}")


def needs_captions(tasks: tuple[str, ...]) -> bool:
    """Whether samples of `tasks` are captions, or made from them."""
    return not tasks or any(not TASKS[task][0] for task in tasks)


def check_caption(record: dict, caption: str, task: str) -> None:
    """Raises ValueError where a record has neither an example of `task` nor a caption."""
    if not caption:
        raise ValueError(f"data.tasks {task!r}: no example and no caption in {record}")


def spoken(answer: object) -> str:
    """One text of an answer as records have it: a string, what several people said (the most
    frequent), answers with scores (the best), true or false; empty where it is None.
    """
    if isinstance(answer, Mapping):
        return max(answer, key=answer.get, default="")
    if isinstance(answer, list):
        return Counter(answer).most_common(1)[0][0] if answer else ""
    return "" if answer is None else str(answer).lower() if _is_truth(answer) else str(answer)


def _is_truth(answer: object) -> bool:
    return isinstance(answer, bool) or answer in ("True", "False")


def examples(
    record: dict, task: str, *, num_bins: int = 0, crop: Box = WHOLE
) -> list[tuple[str, str]]:
    """(prompt, text that answers it) of every example of `task`, one of records, in a record.

    Args:
        record: of a sample.
        task: one of `TASKS` that has a field.
        num_bins: location tokens.
        crop: the part of the image that is shown.

    Raises:
        ValueError: the record has no such field, or an object has no box.
    """
    _, prompt, answer = TASKS[task]
    found = asked(record, task)
    if task in LOCATED:
        found = [
            {"name": name, "place": spell(box, num_bins) if num_bins else ""}
            for name, box in named_objects(record, crop)
        ]
    if task in ANSWER:
        key = ANSWER[task][1]
        # Of what several people said, VQA's own choice where it says which.
        told = [spoken(e.get("multiple_choice_answer", e.get(key))) for e in found]
        found = [{**example, key: text} for example, text in zip(found, told, strict=True)]
    return [(prompt.format(**example), answer.format(**example)) for example in found]


def choose(
    record: dict,
    caption: str,
    task: str,
    number: int,
    *,
    num_bins: int = 0,
    crop: Box = WHOLE,
) -> tuple[str, str]:
    """One (prompt, text): the example `number`, counted around, of a record; its caption where it
    has none. The text of "image" is empty: codes take its place.
    """
    field, prompt, answer = TASKS[task]
    if field:
        found = examples(record, task, num_bins=num_bins, crop=crop)
        if found:
            return found[number % len(found)]
        check_caption(record, caption, task)
        _, prompt, answer = TASKS["caption"]
    return prompt.format(caption=caption), answer.format(caption=caption)


def iter_texts(index: Index, tasks: tuple[str, ...]) -> Iterator[str]:
    """All prompts and answers of an index but for captions and places, for training a tokenizer."""
    for task in dict.fromkeys(tasks):
        field, prompt, _ = TASKS[task]
        if not field:
            yield prompt.format(caption="")
            continue
        for i in range(len(index)):
            for pair in examples(index.record(i), task):
                yield from filter(None, pair)
