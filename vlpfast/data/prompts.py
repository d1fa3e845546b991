"""Prompts and the texts that answer them: a caption, the answer to a question, whether a sentence
holds; from records of generated scenes, or of any data with the same fields.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlpfast.data.index import Index

# What is asked, and of which field of a record; "caption" is of the captions.
TASKS = {
    "caption": ("", "caption", ""),
    "vqa": ("questions", "{question}", "answer"),
    "entailment": ("entailment", "is it so? {sentence}", "label"),
}


def examples(record: dict, task: str) -> list[tuple[str, str]]:
    """(prompt, text that answers it) of every example of `task` but "caption" in a record.

    Raises:
        ValueError: the record has no such field.
    """
    field, prompt, answer = TASKS[task]
    if field not in record:
        raise ValueError(f"data.tasks {task!r}: no field {field!r}, found {sorted(record)}")
    return [(prompt.format(**example), example[answer]) for example in record[field]]


def choose(record: dict, caption: str, task: str, number: int) -> tuple[str, str]:
    """One (prompt, text): the example `number`, counted around, of a record; its caption where it
    has none.
    """
    found = [] if task == "caption" else examples(record, task)
    return found[number % len(found)] if found else (TASKS["caption"][1], caption)


def iter_texts(index: Index, tasks: tuple[str, ...]) -> Iterator[str]:
    """All prompts and answers of an index, for training a tokenizer."""
    for task in tasks:
        if task == "caption":
            yield TASKS[task][1]
            continue
        for i in range(len(index)):
            for prompt, text in examples(index.record(i), task):
                yield prompt
                yield text
