"""Scores of a data set's image-text pairs, and the samples kept by them.

A folder of scores holds for each shard S one S.npy, float32 scores of its valid samples in the
order of the index, NaN where a sample cannot be read, one S.json that counts and names those, and
scores.json: what made them, of which data. A table has a part for each `sidecar.PART_ROWS` of its
samples. `vlpfast.clean` writes them; nothing here knows a model.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlpfast.data.build import atomic, locked
from vlpfast.data.config import LOWEST_SCORE
from vlpfast.data.index import Index
from vlpfast.data.quantile import top_share
from vlpfast.data.sidecar import NAMED, PART_ROWS, Part, Sidecar, num_parts, parts, rows_in
from vlpfast.data.tables import Column, load_column

_LOG = logging.getLogger("vlpfast.data")


def scores_in(folder: str | Path) -> Sidecar:
    """The folder of scores."""
    return Sidecar(Path(folder), "scores", ".npy")


def write_scores(
    files: Sidecar, part: Part, scores: np.ndarray, corrupt: Mapping[str, str] | None = None
) -> None:
    """Writes a part's scores (n,), float32 and NaN where there is none; `corrupt`: the samples that
    cannot be read, and why.
    """
    _check_scores(f"scores of {part.name}", scores, part)
    known = scores[~np.isnan(scores)]
    summary = {
        "num_scored": len(known),
        "sum": float(known.sum(dtype=np.float64)),
        "range": [float(known.min()), float(known.max())] if len(known) else [],
        "corrupt": dict(corrupt or {}),
    }
    files.write_summary(part, summary)
    with atomic(files.path(part)) as temporary, temporary.open("wb") as file:
        np.save(file, scores)


def finish_scores(files: Sidecar, index: Index) -> dict[str, object] | None:
    """Adds the totals of all parts to the description and returns it; None if some part is not
    finished.
    """
    num_scored = num_corrupt = 0
    total, extremes, corrupt = 0.0, [], {}
    for part in parts(index):
        if not files.is_finished(part):
            return None
        found = files.summary(part)
        num_scored += found["num_scored"]
        num_corrupt += len(found["corrupt"])
        total += found["sum"]
        extremes = sorted(extremes + found["range"])
        extremes = [extremes[0], extremes[-1]] if extremes else []
        corrupt |= dict(list(found["corrupt"].items())[: NAMED - len(corrupt)])
    return files.finish(
        {
            "num_parts": num_parts(index),
            "num_scored": num_scored,
            "num_unscored": len(index.tables["size"]) - num_scored,
            "num_corrupt": num_corrupt,
            "mean": total / max(1, num_scored),
            "range": extremes,
            "corrupt": corrupt,
        }
    )


def iter_scores(files: Sidecar, index: Index) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, float32 scores) of the selection `index`, one part after the other.

    Raises:
        ValueError: the scores are of other data, or not all there.
    """
    files.check_data(index)
    for part in parts(index):
        path = files.need(part, "vlpfast data score")
        scores = load_column(path)
        _check_scores(str(path), scores, part)
        rows = rows_in(index, part)
        yield rows, scores[rows - part.first]


def _check_scores(what: str, scores: np.ndarray, part: Part) -> None:
    if scores.shape != (part.num_rows,) or scores.dtype != np.float32:
        raise ValueError(
            f"{what}: expected float32 ({part.num_rows},), got {scores.dtype} {scores.shape}"
        )


def kept(
    index: Index, folder: str | Path, *, min_score: float = LOWEST_SCORE, keep_fraction: float = 1.0
) -> Index:
    """The samples of `index` whose score is at least `min_score` and among the highest
    `keep_fraction` of those that have one; as many as tie with the last of these stay too.

    The kept rows are written once beside the index and memory-mapped.

    Raises:
        ValueError: the scores are of other data or not all there, or no sample is kept.
    """
    files = scores_in(folder)
    files.check_data(index)
    rule = [files.identity(), min_score, keep_fraction, _rows_sha256(index)]
    key = hashlib.sha256(json.dumps(rule).encode()).hexdigest()[:16]
    path = index.folder / f"kept-{key}.npy"
    with locked(path):
        if not path.exists():
            _write_kept(index, files, path, min_score, keep_fraction)
    rows = load_column(path)
    _LOG.warning(
        "%s: %d of %d samples kept by their scores (%.1f %%)",
        index.source,
        len(rows),
        len(index),
        100 * len(rows) / len(index),
    )
    return replace(index, rows=rows)


def _write_kept(
    index: Index, files: Sidecar, path: Path, min_score: float, keep_fraction: float
) -> None:
    threshold = min_score
    if keep_fraction < 1:
        passed = lambda: (scores for _, scores in iter_scores(files, index))
        threshold = max(min_score, top_share(passed, keep_fraction)[0])
    with atomic(path) as temporary:
        column, num_kept = Column(temporary, np.int64), 0
        for rows, scores in iter_scores(files, index):
            # NaN is not at least anything.
            rows = rows[scores >= np.float32(threshold)]
            column.extend(rows)
            num_kept += len(rows)
        column.close()
        if not num_kept:
            found = files.description()
            raise ValueError(
                f"{index.source}: no sample has a score of at least {min_score}; they "
                f"({found['metric']}) are in {found.get('range')}"
            )


def _rows_sha256(index: Index) -> str:
    """Hash of which samples a selection has."""
    if isinstance(index.rows, range):
        return "all"
    digest = hashlib.sha256()
    for first in range(0, len(index.rows), PART_ROWS):
        digest.update(np.ascontiguousarray(index.rows[first : first + PART_ROWS], np.int64))
    return digest.hexdigest()
