"""Captions that stand in the place of a data set's own: a JSONL file for each shard beside it.

Line n of S.jsonl is of the n-th valid sample of shard S: its `captions`, which may be none, and
where they came from. A sample without any is left out. `vlpfast.clean.capfilt` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlpfast.data.build import atomic, locked
from vlpfast.data.index import Index
from vlpfast.data.sidecar import NAMED, Part, Sidecar, num_parts, parts
from vlpfast.data.tables import BytesColumn, BytesTable, Column, load_column

# What a line counts, each summed over the lines of a part and over all parts.
COUNTS = ("web", "web_kept", "synthetic", "synthetic_kept")


def captions_in(folder: str | Path) -> Sidecar:
    """The folder of captions."""
    return Sidecar(Path(folder), "captions", ".jsonl")


def write_captions(
    files: Sidecar, part: Part, lines: Iterable[Mapping[str, object]], corrupt: Mapping[str, str]
) -> None:
    """Writes a part's lines, one for each of its samples in order, as they come.

    Args:
        lines: each with `captions` and the numbers `COUNTS`.
        corrupt: samples that cannot be read, and why; read when the last line has come.
    """
    totals, num_lines, num_kept = dict.fromkeys(COUNTS, 0), 0, 0
    with atomic(files.path(part)) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            for line in lines:
                counts = {name: line[name] for name in COUNTS}
                totals = {name: totals[name] + counts[name] for name in COUNTS}
                num_lines += 1
                num_kept += bool(line["captions"])
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if num_lines != part.num_rows:
            raise ValueError(
                f"captions of {part.name}: expected {part.num_rows} lines, got {num_lines}"
            )
        summary = {f"num_{name}": count for name, count in totals.items()}
        files.write_summary(part, {"num_kept": num_kept, **summary, "corrupt": dict(corrupt)})


def finish_captions(files: Sidecar, index: Index) -> dict[str, object] | None:
    """Adds the totals of all parts to the description and returns it; None if some part is not
    finished.
    """
    totals = dict.fromkeys(("num_kept", *(f"num_{name}" for name in COUNTS)), 0)
    num_corrupt, corrupt = 0, {}
    for part in parts(index):
        if not files.is_finished(part):
            return None
        found = files.summary(part)
        totals = {name: totals[name] + found[name] for name in totals}
        num_corrupt += len(found["corrupt"])
        corrupt |= dict(list(found["corrupt"].items())[: NAMED - len(corrupt)])
    named = {"num_parts": num_parts(index), **totals, "num_corrupt": num_corrupt}
    return files.finish({**named, "corrupt": corrupt})


def recaptioned(index: Index, folder: str | Path) -> Index:
    """The samples of `index` that have captions in `folder`, with these in the place of their own.

    The captions are written into tables beside them once, and memory-mapped.

    Raises:
        ValueError: the captions are of other data or not all there, or no sample has any.
    """
    files = captions_in(folder)
    files.check_data(index)
    for part in parts(index):
        files.need(part, "vlpfast data capfilt")
    tables = files.folder / f"tables-{files.identity()[:16]}"
    with locked(tables):
        if not tables.is_dir():
            with atomic(tables) as temporary:
                temporary.mkdir()
                _write_tables(_lines(files, index), temporary)
    starts = load_column(tables / "caption_starts.npy")
    if isinstance(index.rows, range):
        rows = load_column(tables / "rows.npy")
    else:
        rows = index.rows[np.diff(starts)[index.rows] > 0]
    if not len(rows):
        raise ValueError(f"{index.source}: no sample has a caption in {files.folder}")
    return replace(
        index,
        folder=tables,
        tables={**index.tables, "caption_starts": starts},
        strings={**index.strings, "captions": BytesTable(tables, "captions")},
        rows=rows,
    )


def _lines(files: Sidecar, index: Index) -> Iterator[list[str]]:
    """The captions of every sample."""
    for part in parts(index):
        path, num_lines = files.path(part), 0
        with path.open(encoding="utf-8") as file:
            for line in file:
                num_lines += 1
                yield json.loads(line)["captions"]
        if num_lines != part.num_rows:
            raise ValueError(f"{path}: expected {part.num_rows} lines, found {num_lines}")


def _write_tables(lines: Iterable[list[str]], folder: Path) -> None:
    starts = Column(folder / "caption_starts.npy", np.int64)
    rows = Column(folder / "rows.npy", np.int64)
    texts = BytesColumn(folder, "captions")
    count = 0
    starts.append(0)
    for row, captions in enumerate(lines):
        for caption in captions:
            texts.append(caption.encode())
        count += len(captions)
        starts.append(count)
        if captions:
            rows.append(row)
    for column in (starts, rows, texts):
        column.close()
