"""The answers of an index's questions, numbered."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

from vlpfast.data.build import atomic
from vlpfast.data.index import Index
from vlpfast.data.prompts import examples


def open_answers(index: Index, tasks: tuple[str, ...], most: int) -> dict[str, int]:
    """Numbers of the `most` most frequent answers to what `tasks` ask, counted once and kept beside
    the index's tables; of equally frequent ones the first in the alphabet comes first.

    Raises:
        ValueError: a record has no such field.
    """
    stem = hashlib.sha256(json.dumps(tasks).encode()).hexdigest()[:16]
    path = index.folder / f"answers-{stem}.json"
    if not path.exists():
        asked = [task for task in tasks if task != "caption"]
        counts = Counter(
            answer
            for record in map(json.loads, index.strings["records"])
            for task in asked
            for _, answer in examples(record, task)
        )
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(sorted(counts, key=lambda a: (-counts[a], a))))
    names = json.loads(path.read_text())[:most]
    return {name: number for number, name in enumerate(names)}
