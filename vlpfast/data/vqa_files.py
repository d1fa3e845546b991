"""VQA v2's own files: the questions of a split, and their answers in another file beside it."""

from __future__ import annotations

import json
from pathlib import Path


def beside(source: Path) -> list[Path]:
    """The file of answers that belongs to one of questions, where there is one.

    `v2_OpenEnded_mscoco_train2014_questions.json` has its answers in
    `v2_mscoco_train2014_annotations.json`; the test split has none.
    """
    if not source.name.endswith("questions.json"):
        return []
    name = source.name.replace("OpenEnded_", "").removesuffix("questions.json")
    path = source.with_name(name + "annotations.json")
    return [path] if path.is_file() else []


def questions(source: Path, read: dict) -> list[dict]:
    """A row for each question: image, question, question_id, image_id, and where there are answers
    `answer` (what each of ten people said), answer_type, question_type, multiple_choice_answer.

    Images are COCO's: `train2014/COCO_train2014_000000000009.jpg` beside the file.

    Args:
        source: of the questions.
        read: what it holds.

    Raises:
        ValueError: it does not say whose images are meant.

    Source: visualqa.org/download.html, "Input Questions Format" and "Annotation Format".
    """
    if "data_subtype" not in read:
        raise ValueError(f"{source}: 'questions' without 'data_subtype', found {sorted(read)}")
    # The part of the test set that has a server of its own shares the test set's images.
    images = read["data_subtype"].replace("test-dev", "test")
    answers = {}
    for path in beside(source):
        answers = {a["question_id"]: a for a in json.loads(path.read_bytes())["annotations"]}
    rows = []
    for asked in read["questions"]:
        name = f"{images}/COCO_{images}_{asked['image_id']:012d}.jpg"
        row = {"image": name, **asked}
        if asked["question_id"] in answers:
            given = dict(answers[asked["question_id"]])
            row |= given | {"answer": [person["answer"] for person in given.pop("answers")]}
            row.pop("answers", None)
        rows.append(row)
    return rows
