"""Class tables: which class names an index knows, and which of them each sample shows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlpfast.data import augment
from vlpfast.data.build import atomic
from vlpfast.data.index import Index
from vlpfast.data.scenes.space import HELD_OUT
from vlpfast.data.tables import Column, load_column


class ClassTable:
    """Class names, and of every row of an index's tables the classes that it shows.

    Args:
        names: C of them, sorted.
        starts (N + 1,): int64; row i shows `values[starts[i]:starts[i + 1]]`.
        values: int32 numbers of names.
    """

    def __init__(self, names: list[str], starts: np.ndarray, values: np.ndarray) -> None:
        self.names, self.starts, self.values = names, starts, values

    def of(self, row: int) -> list[int]:
        """The classes of row `row`."""
        return self.values[self.starts[row] : self.starts[row + 1]].tolist()

    def draw(self, rows: np.ndarray, seed: int, positions: Tensor) -> Tensor:
        """(B,) int64: one of the classes of each row, a function of (seed, place in the stream);
        -100 where a row has none.
        """
        starts = torch.from_numpy(self.starts[rows])
        counts = torch.from_numpy(self.starts[rows + 1]) - starts
        places = augment.integers(seed, positions, augment.CLASS, counts.clamp(min=1))
        found = (starts + places).clamp(max=max(len(self.values) - 1, 0)).numpy()
        classes = torch.from_numpy(self.values[found].astype(np.int64))
        return torch.where(counts > 0, classes, -100)


def class_names(record: dict, key: str) -> list[str]:
    """The class names of one record, each once.

    Args:
        record: of a sample.
        key: "scenes" names the objects of a generated scene, "scenes-heldout" those of held-out
            combinations of color and shape; else a field that holds a name or a list of names.

    Raises:
        ValueError: the record has no such field.
    """
    field = "objects" if key.startswith("scenes") else key
    if field not in record:
        raise ValueError(f"data.classes {key!r}: no field {field!r}, found {sorted(record)}")
    found = record[field]
    if field == key:
        return list(dict.fromkeys([found] if isinstance(found, str) else found))
    pairs = [(o["shape"], o["color"]) for o in found]
    kept = [pair for pair in pairs if key == "scenes" or pair in HELD_OUT]
    return list(dict.fromkeys(f"a {color} {shape}" for shape, color in kept))


def open_classes(index: Index, key: str) -> ClassTable | None:
    """The class table of an index, cached beside its tables; None without a `key`."""
    if not key:
        return None
    stem = f"classes-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    paths = [index.folder / f"{stem}{suffix}" for suffix in (".json", "-starts.npy", "-values.npy")]
    if not all(path.exists() for path in paths):
        _build(index, key, *paths)
    names = json.loads(paths[0].read_text())
    return ClassTable(names, load_column(paths[1]), load_column(paths[2]))


def _build(index: Index, key: str, names_path: Path, starts_path: Path, values_path: Path) -> None:
    """Two passes over the records: the names, then every row's numbers."""
    records = index.strings["records"]
    names = sorted({name for r in records for name in class_names(json.loads(r), key)})
    number = {name: i for i, name in enumerate(names)}
    with (
        atomic(names_path) as n_path,
        atomic(starts_path) as s_path,
        atomic(values_path) as v_path,
    ):
        starts, values = Column(s_path, np.int64), Column(v_path, np.int32)
        starts.append(0)
        end = 0
        for record in records:
            for name in class_names(json.loads(record), key):
                values.append(number[name])
                end += 1
            starts.append(end)
        starts.close()
        values.close()
        n_path.write_text(json.dumps(names))
