"""Detectors' feature files as region tables: the TSV files of bottom-up attention (LXMERT, ViLBERT)
and the LMDB folders of UNITER, rewritten once in the order of an index.

Formats: airsplay/lxmert src/utils.py, peteanderson80/bottom-up-attention tools/read_tsv.py,
ChenRocks/UNITER scripts/convert_imgdir.py.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from vlpfast.data.build import atomic, locked, stable_id
from vlpfast.data.index import Index
from vlpfast.data.tables import Column

_TSV_COLUMNS = {
    6: ("id", "width", "height", "count", "boxes", "features"),
    10: (
        *("id", "height", "width", "objects_id", "objects_conf"),
        *("attrs_id", "attrs_conf", "count", "boxes", "features"),
    ),
}
# What the detectors trained on Visual Genome know, background and "none" apart.
_NUM_OBJECTS, _NUM_ATTRIBUTES = 1600, 400


@dataclass(frozen=True)
class Detected:
    """What a file says of one image: K regions.

    Attributes:
        features (K, D), boxes (K, 4): fp32; boxes as (x1, y1, x2, y2) in fractions of the sides.
        labels (K, C): distribution over classes, column 0 background; or None.
        attributes (K, A): distribution over attributes, column 0 none; or None.
    """

    features: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray | None = None
    attributes: np.ndarray | None = None


class RegionTsv:
    """Regions in TSV files without a header line, one image a line, arrays in base64.

    A line has the 6 columns of bottom-up attention or the 10 of LXMERT. The latter's objects and
    attributes become distributions: the confidence on the one that is named, the rest on column 0.

    Args:
        paths: the files; together they should have every image once.
    """

    def __init__(self, paths: Sequence[Path], *, progress: bool = True) -> None:
        self._paths = list(paths)
        line = np.dtype([("id", np.int64), ("start", np.int64)])
        found = [np.fromiter(_scan(path, progress), line) for path in self._paths]
        files = np.repeat(np.arange(len(found)), [len(lines) for lines in found])
        lines = np.concatenate(found)
        order = np.argsort(lines["id"], kind="stable")
        self._ids, self._starts = lines["id"][order], lines["start"][order]
        self._files = files[order]

    def read(self, name: str) -> Detected:
        """The regions of image `name`.

        Raises:
            KeyError: no file has it.
            ValueError: its line does not hold what it should.
        """
        place = np.searchsorted(self._ids, wanted := stable_id(name.lower()))
        if place == len(self._ids) or self._ids[place] != wanted:
            raise KeyError(name)
        with self._paths[self._files[place]].open("rb") as file:
            file.seek(self._starts[place])
            cells = file.readline().rstrip(b"\r\n").split(b"\t")
        return _parse_tsv(dict(zip(_TSV_COLUMNS[len(cells)], cells, strict=True)))


def _scan(path: Path, progress: bool) -> Iterator[tuple[int, int]]:
    """Identity of the image and place in bytes of every line of `path`."""
    bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, disable=not progress)
    bar.set_description(path.name)
    start = 0
    with path.open("rb") as file, bar:
        for number, line in enumerate(file, 1):
            if (count := line.count(b"\t") + 1) not in _TSV_COLUMNS:
                raise ValueError(
                    f"{path}:{number}: expected 6 columns (bottom-up attention) or 10 (LXMERT) "
                    f"without a header, found {count}"
                )
            yield stable_id(line[: line.index(b"\t")].decode().lower()), start
            start += len(line)
            bar.update(len(line))


def _parse_tsv(cells: Mapping[str, bytes]) -> Detected:
    count = int(_number(cells, "count"))

    def array(name: str, width: int, dtype: type) -> np.ndarray:
        try:
            values = np.frombuffer(base64.b64decode(cells[name], validate=True), dtype)
            return values.reshape(count, width)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"{name}: not base64 of {count} rows: {error}") from error

    sides = np.array([_number(cells, side) for side in ("width", "height")] * 2)

    def distribution(what: str, num_classes: int) -> np.ndarray | None:
        if f"{what}_id" not in cells:
            return None
        ids, confidence = array(f"{what}_id", 1, np.int64), array(f"{what}_conf", 1, np.float32)
        if ((ids < 0) | (ids >= num_classes)).any():
            raise ValueError(
                f"{what}_id: expected ids in 0 to {num_classes - 1}, got {ids.ravel()}"
            )
        found = np.zeros((count, 1 + num_classes), np.float32)
        np.put_along_axis(found, 1 + ids, confidence, 1)
        found[:, 0] = 1 - confidence[:, 0]
        return found

    return Detected(
        array("features", -1, np.float32),
        (array("boxes", 4, np.float32) / sides).astype(np.float32),
        distribution("objects", _NUM_OBJECTS),
        distribution("attrs", _NUM_ATTRIBUTES),
    )


def _number(cells: Mapping[str, bytes], name: str) -> float:
    try:
        value = float(cells[name])
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError(f"{name}: expected a number > 0, got {cells[name][:20]!r}")
    return value


class RegionLmdb:
    """Regions in one of UNITER's LMDB folders (`feat_th0.2_max100_min10`, compressed or not).

    Values are npz archives, or msgpack of NumPy arrays, of features, norm_bb and, where the
    detector's classes were kept, soft_labels; keys are file names that end in .npz. Needs the
    package lmdb, and msgpack and msgpack-numpy for values of that kind.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import lmdb
        except ModuleNotFoundError as error:
            raise RuntimeError("UNITER's folders need lmdb: pip install lmdb") from error
        self._environment = lmdb.open(str(folder), readonly=True, create=False, lock=False)
        self._transaction = self._environment.begin(buffers=True)

    def read(self, name: str) -> Detected:
        """The regions of image `name`, with or without .npz, as written or in lower case.

        Raises:
            KeyError: there is none of that name.
            ValueError: its value does not hold what it should.
        """
        stem = name.removesuffix(".npz")
        for key in (stem, stem.lower()):
            value = self._transaction.get(f"{key}.npz".encode())
            if value is not None:
                return _parse_uniter(_load_uniter(bytes(value)))
        raise KeyError(name)


def _load_uniter(value: bytes) -> Mapping[str, np.ndarray]:
    if value.startswith(b"PK"):
        try:
            with np.load(io.BytesIO(value)) as archive:
                return dict(archive)
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise ValueError(f"not an npz archive: {error}") from error
    try:
        import msgpack
        import msgpack_numpy
    except ModuleNotFoundError as error:
        problem = "values that are not compressed need msgpack and msgpack-numpy"
        raise RuntimeError(f"{problem}: pip install msgpack msgpack-numpy") from error
    return msgpack.unpackb(value, object_hook=msgpack_numpy.decode)


def _parse_uniter(arrays: Mapping[str, np.ndarray]) -> Detected:
    missing = {"features", "norm_bb"} - set(arrays)
    if missing:
        raise ValueError(f"expected features and norm_bb, found {sorted(arrays)}")
    features, boxes = (np.asarray(arrays[n], np.float32) for n in ("features", "norm_bb"))
    labels = arrays.get("soft_labels")
    # Columns beyond the corners are width and height.
    return Detected(features, boxes[:, :4], None if labels is None else np.asarray(labels))


def open_files(paths: Sequence[Path]) -> RegionTsv | RegionLmdb:
    """TSV files, or one LMDB folder.

    Raises:
        ValueError: `paths` are neither.
    """
    if len(paths) == 1 and paths[0].is_dir():
        return RegionLmdb(paths[0])
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: expected TSV files, or one LMDB folder alone")
    if not paths:
        raise ValueError("files: expected TSV files or an LMDB folder, got none")
    return RegionTsv(paths)


def write_regions(
    index: Index,
    files: RegionTsv | RegionLmdb,
    folder: Path,
    *,
    name_key: str = "",
    progress: bool = True,
) -> dict[str, object]:
    """Writes the region table of all samples of an index's source, boxes in fp32, all else in fp16.

    An image that the files do not have, or not well formed, gets no regions, by which training
    leaves it out (`data.regions.with_regions`).

    Args:
        index: of the source.
        files: the detector's.
        folder: to write; `<source>.regions` is where `data.regions="files"` looks.
        name_key: record field whose value the detector's files call an image by; empty takes the
            image file's name without its extension. Case does not matter.

    Returns: out, num_images, num_regions, num_without, and without: name -> reason.

    Raises:
        ValueError: a sample lacks `name_key`, no image has regions, or their widths differ.
    """
    source = replace(index, rows=range(len(index.tables["size"])))
    without: dict[str, str] = {}
    with locked(folder), atomic(folder) as temporary:
        temporary.mkdir(parents=True)
        writer = _Writer(temporary)
        for i in tqdm(range(len(source)), unit="image", disable=not progress):
            name = _name(source, i, name_key)
            try:
                writer.append(files.read(name))
            except KeyError:
                without[source.name(i)] = f"the files do not have {name!r}"
                writer.append(None)
            except ValueError as error:
                without[source.name(i)] = str(error)
                writer.append(None)
        if not writer.num_regions:
            reason = next((f"{n}: {r}" for n, r in without.items()), "it has no samples")
            raise ValueError(f"{index.source}: no image has regions; first reason: {reason}")
        writer.close()
        (temporary / "without.json").write_text(json.dumps(without, indent=1))
    return {
        "out": str(folder),
        "num_images": len(source),
        "num_regions": writer.num_regions,
        "num_without": len(without),
        "without": without,
    }


def _name(index: Index, i: int, key: str) -> str:
    if not key:
        return PurePosixPath(index.name(i)).stem
    record = index.record(i)
    if key not in record:
        raise ValueError(f"{index.name(i)} has no field {key!r}, found {sorted(record)}")
    return str(record[key])


class _Writer:
    """The arrays of a region table, image by image."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._columns: dict[str, Column] = {}
        self._widths: dict[str, int] = {}
        self._offsets = Column(folder / "offsets.npy", np.int64)
        self._offsets.append(0)
        self.num_regions = 0

    def append(self, found: Detected | None) -> None:
        """Adds an image; None has no regions."""
        if found is not None:
            self._add(found)
        self._offsets.append(self.num_regions)

    def _add(self, found: Detected) -> None:
        parts = {name: part for name, part in vars(found).items() if part is not None}
        widths = {name: part.shape[1] for name, part in parts.items()}
        lengths = {len(part) for part in parts.values()}
        if len(lengths) > 1:
            raise ValueError(f"{', '.join(parts)} differ in their number of regions: {lengths}")
        if not self._columns:
            self._widths = widths
            for name, part in parts.items():
                dtype = np.float32 if name == "boxes" else np.float16
                path = self._folder / f"{name}.npy"
                self._columns[name] = Column(path, dtype, width=part.shape[1])
        if widths != self._widths:
            raise ValueError(f"expected widths {self._widths}, as of the first image, got {widths}")
        for name, part in parts.items():
            self._columns[name].extend(part)
        self.num_regions += len(found.features)

    def close(self) -> None:
        for column in (*self._columns.values(), self._offsets):
            column.close()
