"""Scores of a data set's image-text pairs: files beside the data, and the samples kept by them.

A folder of scores holds for each shard S one S.npy, float32 scores of its valid samples in the
order of the index, NaN where a sample cannot be read, one S.json that counts and names those, and
scores.json: what made them, of which data. A table has a part for each `PART_ROWS` of its samples.
`vlpfast.clean` writes them; nothing here knows a model.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vlpfast.data.build import atomic, locked
from vlpfast.data.config import LOWEST_SCORE
from vlpfast.data.index import Index
from vlpfast.data.quantile import top_share
from vlpfast.data.sources import containers
from vlpfast.data.tables import Column, load_column

PART_ROWS = 100_000
# Of the corrupt samples, how many the summary names; each shard's own file names all of its.
NAMED = 20
_DESCRIPTION = "scores.json"
# What these are called may change with the place of run and data; what they are may not.
_PATHS = ("run", "weights", "data")
_LOG = logging.getLogger("vlpfast.data")


@dataclass(frozen=True)
class Part:
    """Rows `first` to `last` - 1 of an index's tables: a shard's, or a stretch of a table's."""

    name: str
    first: int
    last: int


def num_parts(index: Index) -> int:
    """How many parts the source of `index` has."""
    shards = len(index.strings["containers"])
    return shards or -(-len(index.tables["size"]) // PART_ROWS)


def part(index: Index, number: int) -> Part:
    """Part `number` of the source of `index`."""
    shards, num_rows = index.strings["containers"], len(index.tables["size"])
    if not len(shards):
        first = number * PART_ROWS
        return Part(f"{number:06d}", first, min(first + PART_ROWS, num_rows))
    # Rows stand in the order of their shards.
    first, last = np.searchsorted(index.tables["container"], [number, number + 1])
    return Part(Path(shards[number].decode()).stem, int(first), int(last))


def parts(index: Index) -> Iterator[Part]:
    """All parts, in the order of the rows."""
    return (part(index, number) for number in range(num_parts(index)))


def rows_in(index: Index, chosen: Part) -> np.ndarray:
    """The rows of the selection `index` that are in a part, int64 ascending."""
    if isinstance(index.rows, range):
        return np.arange(chosen.first, chosen.last)
    first, last = np.searchsorted(index.rows, [chosen.first, chosen.last])
    return np.asarray(index.rows[first:last])


def source_sha256(source: Path) -> str:
    """Hash of the names and sizes of a source's files: a copy of the data is the same data."""
    digest = hashlib.sha256()
    for path in containers(source):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def begin(folder: Path, index: Index, made_by: Mapping[str, object]) -> None:
    """Says in a new `folder` what its scores will be, or sees that an old one's are the same.

    Args:
        folder: made if missing.
        index: of the whole source.
        made_by: `metric`, `run`, and all else that decides the scores, as JSON values.

    Raises:
        ValueError: the folder has other scores.
    """
    wanted = {
        **made_by,
        "data": str(index.source),
        "data_sha256": source_sha256(index.source),
        "num_samples": len(index.tables["size"]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / _DESCRIPTION):
        if (folder / _DESCRIPTION).exists():
            found = description(folder)
            for name in sorted(set(wanted) - set(_PATHS)):
                if found.get(name) != wanted[name]:
                    raise ValueError(
                        f"{folder} holds scores of {name} {found.get(name)!r}, expected "
                        f"{wanted[name]!r}: name another folder"
                    )
            return
        _write_json(folder / _DESCRIPTION, wanted)


def is_finished(folder: Path, chosen: Part) -> bool:
    """Whether a part has its scores."""
    return (folder / f"{chosen.name}.npy").exists()


def write_part(
    folder: Path, chosen: Part, scores: np.ndarray, corrupt: Mapping[str, str] | None = None
) -> None:
    """Writes a part's scores (last - first,), float32 and NaN where there is none; `corrupt`: the
    samples that cannot be read, and why. A part is there as a whole or not at all.
    """
    if scores.shape != (chosen.last - chosen.first,) or scores.dtype != np.float32:
        raise ValueError(
            f"scores of {chosen.name}: expected float32 ({chosen.last - chosen.first},), got "
            f"{scores.dtype} {scores.shape}"
        )
    known = scores[~np.isnan(scores)]
    summary = {
        "num_scored": len(known),
        "sum": float(known.sum(dtype=np.float64)),
        "range": [float(known.min()), float(known.max())] if len(known) else [],
        "corrupt": dict(corrupt or {}),
    }
    _write_json(folder / f"{chosen.name}.json", summary)
    # Last: it says that the part is finished.
    with atomic(folder / f"{chosen.name}.npy") as temporary, temporary.open("wb") as file:
        np.save(file, scores)


def finish(folder: Path, index: Index) -> dict[str, object] | None:
    """Adds the totals of all parts to the description and returns it; None if some part is not
    finished.
    """
    num_scored = num_samples = num_corrupt = 0
    total, extremes, corrupt = 0.0, [], {}
    for chosen in parts(index):
        if not is_finished(folder, chosen):
            return None
        found = json.loads((folder / f"{chosen.name}.json").read_text())
        num_samples += chosen.last - chosen.first
        num_scored += found["num_scored"]
        num_corrupt += len(found["corrupt"])
        total += found["sum"]
        extremes = sorted(extremes + found["range"])
        extremes = [extremes[0], extremes[-1]] if extremes else []
        corrupt |= dict(list(found["corrupt"].items())[: NAMED - len(corrupt)])
    done = description(folder) | {
        "num_parts": num_parts(index),
        "num_scored": num_scored,
        "num_unscored": num_samples - num_scored,
        "num_corrupt": num_corrupt,
        "mean": total / max(1, num_scored),
        "range": extremes,
        "corrupt": corrupt,
    }
    _write_json(folder / _DESCRIPTION, done)
    return done


def description(folder: Path) -> dict[str, object]:
    """What scores.json says.

    Raises:
        ValueError: it is not there.
    """
    try:
        return json.loads((folder / _DESCRIPTION).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no folder of scores: it has no {_DESCRIPTION}") from error


def identity(folder: Path) -> str:
    """Hash of what decides the scores in `folder`, not of where they and their data are."""
    found = {k: v for k, v in description(folder).items() if k not in _PATHS}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def iter_scores(folder: Path, index: Index) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, float32 scores) of the selection `index`, one part after the other.

    Raises:
        ValueError: the scores are of other data, or not all there.
    """
    _check_data(folder, index)
    for chosen in parts(index):
        path = folder / f"{chosen.name}.npy"
        if not path.exists():
            raise ValueError(f"{folder} has no {path.name}: run `vlpfast data score` to its end")
        scores = load_column(path)
        if scores.shape != (chosen.last - chosen.first,) or scores.dtype != np.float32:
            raise ValueError(
                f"{path}: expected float32 scores of {chosen.last - chosen.first} samples, found "
                f"{scores.dtype} {scores.shape}"
            )
        rows = rows_in(index, chosen)
        yield rows, scores[rows - chosen.first]


def _check_data(folder: Path, index: Index) -> None:
    found, num_samples = description(folder), len(index.tables["size"])
    if found["num_samples"] != num_samples:
        raise ValueError(
            f"{folder} has scores of {found['num_samples']} samples, {index.source} has "
            f"{num_samples}: they are of other data ({found['data']})"
        )
    if found["data_sha256"] != source_sha256(index.source):
        raise ValueError(
            f"{folder} has scores of {found['data']}, whose files have other names or sizes than "
            f"those of {index.source}"
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
    folder = Path(folder)
    _check_data(folder, index)
    rule = [identity(folder), min_score, keep_fraction, _rows_sha256(index)]
    key = hashlib.sha256(json.dumps(rule).encode()).hexdigest()[:16]
    path = index.folder / f"kept-{key}.npy"
    with locked(path):
        if not path.exists():
            _write_kept(index, folder, path, min_score, keep_fraction)
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
    index: Index, folder: Path, path: Path, min_score: float, keep_fraction: float
) -> None:
    threshold = min_score
    if keep_fraction < 1:
        passed = lambda: (scores for _, scores in iter_scores(folder, index))
        threshold = max(min_score, top_share(passed, keep_fraction)[0])
    with atomic(path) as temporary:
        column, num_kept = Column(temporary, np.int64), 0
        for rows, scores in iter_scores(folder, index):
            # NaN is not at least anything.
            rows = rows[scores >= np.float32(threshold)]
            column.extend(rows)
            num_kept += len(rows)
        column.close()
        if not num_kept:
            found = description(folder)
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


def _write_json(path: Path, value: object) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")
