"""Building an index: every sample of a source checked and written into tables, all or nothing."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vlpfast.data.decode import inspect
from vlpfast.data.sources import SourceRow, containers, iter_rows, shards
from vlpfast.data.tables import BytesColumn, Column

FORMAT_VERSION = 2
# In meta.json: of how many rows nothing is said in a caption.
WITHOUT_CAPTIONS = "num_without_captions"
_CHUNK, _IDENTITY_CHUNK = 1024, 2**20
COLUMNS = {
    "container": np.int32,
    "offset": np.int64,
    "size": np.int64,
    "width": np.int32,
    "height": np.int32,
    "plain": np.bool_,
    "caption_starts": np.int64,
    "image_ids": np.int64,
}
# Of the second images of texts about two, beside those of the first; only such a source has them.
SECOND = {f"second_{name}": COLUMNS[name] for name in list(COLUMNS)[:6]}
SECOND_NAMES = "second_names"
BYTES = ("containers", "names", "captions", "records", "invalid_names", "invalid_reasons")
# Small files are also written without their lock, in far less time.
_LEFT_AFTER_S = 600
_LOG = logging.getLogger("vlpfast.data")
# Size in bytes, width, height, plain.
Checked = tuple[int, int, int, bool]


def stable_id(value: object) -> int:
    """63-bit identity of a record value on every machine: integers stay, all else is hashed."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return value
    text = json.dumps(value, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def is_identity(value: object) -> bool:
    """Whether a record value says what a sample shows: JSON's null and empty cells do not."""
    return value is not None and value != ""


def row_identity(number: int) -> int:
    """Identity of a row without one, among rows that have one; not that of any record value which
    data have.
    """
    return stable_id(["row without identity", number])


def fingerprint(source: Path) -> str:
    """Hash of names, sizes and times of a source's files; of a table not its images."""
    digest = hashlib.sha256()
    for path in containers(source):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def build_tables(
    source: Path,
    folder: Path,
    meta: dict,
    *,
    image_key: str,
    caption_key: str,
    verify: str,
    require_captions: bool,
) -> None:
    """Writes the tables of `source` into `folder`, all or nothing."""
    if verify not in ("header", "decode"):
        raise ValueError(f"verify must be 'header' or 'decode', got {verify!r}")
    with atomic(folder) as temporary, ThreadPoolExecutor() as pool:
        temporary.mkdir(parents=True)
        writer = _Writer(temporary)
        for path in shards(source):
            writer.strings["containers"].append(path.name.encode())
        check = _checker(source, verify, require_captions)
        keys = {"image_key": image_key, "caption_key": caption_key}
        rows = iter_rows(source, need_captions=require_captions, **keys)
        while chunk := list(itertools.islice(rows, _CHUNK)):
            for row, found in zip(chunk, pool.map(check, chunk), strict=True):
                writer.add(row, found)
        writer.close()
        meta = meta | {WITHOUT_CAPTIONS: writer.num_without_captions}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
    if writer.num_invalid:
        _LOG.warning("%s: %d invalid samples left out", source, writer.num_invalid)


def _checker(
    source: Path, verify: str, require_captions: bool
) -> Callable[[SourceRow], list[Checked] | str]:
    """A function from a row to what is found of its images, or to the reason why it is invalid."""
    paths = shards(source)

    def check(row: SourceRow) -> list[Checked] | str:
        if row.problem:
            return row.problem
        if require_captions and not row.captions:
            return "empty caption"
        found = [check_image(image) for image in row.images]
        return next((reason for reason in found if isinstance(reason, str)), found)

    def check_image(row: SourceRow) -> Checked | str:
        path = source.parent / row.name if row.container < 0 else paths[row.container]
        try:
            with open(path, "rb") as file:
                file.seek(row.offset)
                data = file.read(row.size)
            return len(data), *inspect(data, full=verify == "decode")
        except FileNotFoundError:
            return f"missing file: {path}"
        except (OSError, ValueError) as error:
            return str(error)

    return check


class _Writer:
    """Appends valid samples to the tables and invalid ones to the list of reasons."""

    def __init__(self, folder: Path) -> None:
        self.columns = {name: Column(folder / f"{name}.npy", d) for name, d in COLUMNS.items()}
        self.strings = {name: BytesColumn(folder, name) for name in BYTES}
        self.num_rows = self.num_invalid = self.num_without_captions = 0
        self._folder, self._num_captions, self._num_valid = folder, 0, 0
        self._any_identity = False
        self._second: dict[str, Column | BytesColumn] = {}
        self.columns["caption_starts"].append(0)

    def add(self, row: SourceRow, found: list[Checked] | str) -> None:
        number, self.num_rows = self.num_rows, self.num_rows + 1
        self.num_without_captions += not row.captions
        if isinstance(found, str):
            self.num_invalid += 1
            self.strings["invalid_names"].append(os.fsencode(row.name))
            self.strings["invalid_reasons"].append(found.encode(errors="replace"))
            return
        self._num_captions += len(row.captions)
        values = (row.container, row.offset, *found[0], self._num_captions)
        image_id = row.record.get("image_id")
        # Negative: a row without identity, until `close` knows whether others have one.
        image_id = stable_id(image_id) if is_identity(image_id) else -1 - number
        self._any_identity |= image_id >= 0
        for column, value in zip(self.columns.values(), (*values, image_id), strict=True):
            column.append(value)
        self.strings["names"].append(os.fsencode(row.name))
        for caption in row.captions:
            self.strings["captions"].append(caption.encode())
        self.strings["records"].append(json.dumps(row.record).encode())
        self._add_second(row, found)

    def _add_second(self, row: SourceRow, found: list[Checked]) -> None:
        if row.second is not None and self._num_valid == 0:
            self._second = {n: Column(self._folder / f"{n}.npy", d) for n, d in SECOND.items()}
            self._second[SECOND_NAMES] = BytesColumn(self._folder, SECOND_NAMES)
        self._num_valid += 1
        if (row.second is None) != (not self._second):
            raise ValueError(f"{row.name}: all texts of a source are about one image, or all two")
        if row.second is not None:
            values = (row.second.container, row.second.offset, *found[1])
            values = (*values, os.fsencode(row.second.name))
            for column, value in zip(self._second.values(), values, strict=True):
                column.append(value)

    def close(self) -> None:
        for column in (*self.columns.values(), *self.strings.values(), *self._second.values()):
            column.close()
        if self._num_valid:
            self._identify()

    def _identify(self) -> None:
        """Gives rows without identity their number, or where others have one, one of their own."""
        image_ids = np.load(self._folder / "image_ids.npy", mmap_mode="r+")
        for start in range(0, len(image_ids), _IDENTITY_CHUNK):
            chunk = image_ids[start : start + _IDENTITY_CHUNK]
            (rows,) = np.nonzero(chunk < 0)
            numbers = -1 - chunk[rows]
            if self._any_identity:
                numbers = np.fromiter(map(row_identity, numbers.tolist()), np.int64)
            chunk[rows] = numbers
        image_ids.flush()


def read_meta(folder: Path) -> dict:
    try:
        return json.loads((folder / "meta.json").read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the block ends without an error."""
    # Processes of containers that share a file system may have one host name and one id.
    host = socket.gethostname().partition(".")[0][:32]
    unique = f"{host}.{os.getpid()}.{uuid.uuid4().hex}"
    temporary = path.with_name(f".{path.name}.{unique}")
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time build `folder`; the others wait. What a killed one left of it is
    removed.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = open(folder.with_name(f".{folder.name}.lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot be written ({error}); name another index_dir"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _remove_left(folder)
        yield


def _remove_left(path: Path) -> None:
    """Removes the old temporary paths that `atomic` made for `path`; its lock must be held."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[^.]*\.\d+\.[0-9a-f]{{32}}")
    for name in filter(pattern.fullmatch, os.listdir(path.parent)):
        left = path.with_name(name)
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _LEFT_AFTER_S:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
