"""Region tables: what a detector says of every image of an index, memory-mapped.

A folder of features.npy (T, D), offsets.npy (N + 1,) int64, and optionally boxes.npy (T, 4),
labels.npy (T, C) and attributes.npy (T, A); image n has the rows offsets[n] to offsets[n + 1]
(`vlpfast.regions.Regions`).
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlpfast.data.build import atomic, locked
from vlpfast.data.index import Index
from vlpfast.data.scenes.render import regions as scene_regions
from vlpfast.data.scenes.siblings import sample_sibling
from vlpfast.data.scenes.space import Scene, sample_scene
from vlpfast.data.tables import load_column
from vlpfast.ragged import Ragged
from vlpfast.regions import Regions

_OPTIONAL = ("boxes", "labels", "attributes")
_LOG = logging.getLogger("vlpfast.data")


@dataclass(frozen=True)
class RegionTable:
    """Regions of the N samples of a source, in the order of its index.

    Attributes:
        features (T, D), boxes (T, 4) or None, labels (T, C) or None, attributes (T, A) or None:
            arrays on disk.
        offsets (N + 1,): int64.
    """

    features: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray | None
    labels: np.ndarray | None
    attributes: np.ndarray | None

    @classmethod
    def open(cls, folder: Path, num_samples: int) -> RegionTable:
        """The table in `folder`.

        Raises:
            FileNotFoundError: it has no features or offsets.
            ValueError: it is not of `num_samples` images.
        """
        for name in ("features", "offsets"):
            if not (folder / f"{name}.npy").is_file():
                raise FileNotFoundError(
                    f"{folder} holds no regions: {name}.npy is missing (features (T, D), offsets "
                    "(N + 1,), and boxes (T, 4), labels (T, C), attributes (T, A) where the "
                    "detector gives them)"
                )
        arrays = {
            name: load_column(folder / f"{name}.npy")
            for name in ("features", "offsets", *_OPTIONAL)
            if (folder / f"{name}.npy").is_file()
        }
        found = len(arrays["offsets"]) - 1
        if found != num_samples:
            raise ValueError(f"{folder}: expected regions of {num_samples} images, found {found}")
        return cls(**dict.fromkeys(_OPTIONAL) | arrays)

    def at(self, rows: np.ndarray) -> Regions:
        """Regions of images `rows` (B,), fp32."""
        starts = self.offsets[rows]
        lens = self.offsets[rows + 1] - starts
        cu_seqlens = np.concatenate([[0], lens.cumsum()])
        ids = np.arange(cu_seqlens[-1]) + (starts - cu_seqlens[:-1]).repeat(lens)
        features, boxes, labels, attributes = (
            None if table is None else _tensor(table[ids])
            for table in (self.features, self.boxes, self.labels, self.attributes)
        )
        offsets = torch.from_numpy(cu_seqlens.astype(np.int32))
        packed = Ragged(features, offsets, int(lens.max(initial=0)))
        return Regions(packed, boxes, labels, attributes=attributes)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))


def open_regions(index: Index, kind: str) -> RegionTable | None:
    """The regions of an index's source, all its samples.

    Args:
        index: of the source.
        kind: "" is none; "files" is the folder `<source>.regions`; "scenes" makes them from the
            truth of a generated set, once, beside the index.
    """
    if not kind:
        return None
    num_samples = len(index.tables["size"])
    if kind == "files":
        source = index.source
        return RegionTable.open(source.with_name(source.name + ".regions"), num_samples)
    folder = index.folder / "scene_regions"
    with locked(folder):
        if folder.is_dir() and not (folder / "attributes.npy").is_file():
            # Scenes tell their objects' attributes: this table is not whole.
            shutil.rmtree(folder)
        if not folder.is_dir():
            _write_scene_regions(index, folder)
    return RegionTable.open(folder, num_samples)


def with_regions(index: Index, kind: str) -> Index:
    """The samples of `index` that have regions: with "files", those of which they say something."""
    if kind != "files":
        return index
    counts = np.diff(open_regions(index, kind).offsets)
    rows = np.asarray(index.rows)
    kept = rows[counts[rows] > 0]
    if len(kept) == len(rows):
        return index
    _LOG.warning("%s: %d samples without regions left out", index.source, len(rows) - len(kept))
    return replace(index, rows=kept)


def _write_scene_regions(index: Index, folder: Path) -> None:
    records = index.strings["records"]
    infos: dict[str, dict] = {}
    arrays: dict[str, np.ndarray] = {}
    with atomic(folder) as temporary:
        temporary.mkdir()
        for row, record in enumerate(records):
            found = scene_regions(_scene(index, json.loads(record), infos))
            # The detectors that region models are trained on put background first.
            labels, attributes = (
                np.roll(part, 1, axis=1) for part in (found.soft_labels, found.soft_attributes)
            )
            parts = {"features": found.features, "boxes": found.boxes, "labels": labels}
            parts["attributes"] = attributes
            count = len(found.features)
            for name, part in parts.items():
                if name not in arrays:
                    dtype = np.float32 if name == "boxes" else np.float16
                    shape = (len(records) * count, part.shape[1])
                    arrays[name] = np.lib.format.open_memmap(
                        temporary / f"{name}.npy", "w+", dtype, shape
                    )
                arrays[name][row * count : (row + 1) * count] = part
        for array in arrays.values():
            array.flush()
        np.save(temporary / "offsets.npy", np.arange(len(records) + 1) * count)


def _scene(index: Index, record: dict, infos: dict[str, dict]) -> Scene:
    """The scene that a record describes, by its split's summary."""
    problem = f"{index.source}: not a generated set, so data.regions 'scenes' has no truth to use"
    try:
        split, number = record["split"], record["number"]
        folder = index.source if index.source.is_dir() else index.source.parent
        if split not in infos:
            infos[split] = json.loads((folder / f"{split}.info.json").read_text())
        info = infos[split]
    except (KeyError, OSError) as error:
        raise ValueError(f"{problem}; {error!r} is missing") from error
    share = info["siblings"]
    scene = (
        sample_sibling(info["seed"], split, number, share)
        if share
        else sample_scene(info["seed"], split, number)
    )
    if scene.image_id != record["image_id"]:
        raise ValueError(f"{problem}: sample {number} of {split} is another scene")
    return scene
