"""Prompts and the texts that answer them: a caption, the answer to a question, whether a sentence
holds, where an object is and what is somewhere; from records of generated scenes, or of any data
with the same fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vlpfast.data.locations import WHOLE, Box, named_objects, spell

if TYPE_CHECKING:
    from vlpfast.data.index import Index

# What is asked, of which field of a record, and the answer; "caption" and "image" are of captions.
# What answers "image" are the image's codes, which a tokenizer of images gives.
TASKS = {
    "caption": ("", "caption", "{caption}"),
    "vqa": ("questions", "{question}", "{answer}"),
    "entailment": ("entailment", "is it so? {sentence}", "{label}"),
    # As allenai/unified-io-inference uio/runner.py asks, in lower case.
    "box": ("objects", 'which region does the text "{name}" describe?', "{place}"),
    "region": ("objects", 'what does the region "{place}" describe?', "{name}"),
    "image": ("", 'what is the complete image? text: "{caption}"', ""),
}
# Those that speak of places.
LOCATED = ("box", "region")


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
    field, prompt, answer = TASKS[task]
    if field not in record:
        raise ValueError(f"data.tasks {task!r}: no field {field!r}, found {sorted(record)}")
    found = record[field]
    if task in LOCATED:
        found = [
            {"name": name, "place": spell(box, num_bins) if num_bins else ""}
            for name, box in named_objects(record, crop)
        ]
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
