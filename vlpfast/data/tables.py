"""Growing .npy columns and ragged byte tables, written as a stream and read as memory maps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

_FLUSH_ITEMS = 8192


class Column:
    """A .npy file that grows: holds at most a few thousand items in memory.

    Args:
        width: items are rows of so many values; None: single values.
    """

    def __init__(self, path: Path, dtype: DTypeLike, *, width: int | None = None) -> None:
        self._dtype = np.dtype(dtype)
        self._row = () if width is None else (width,)
        self._file = path.open("wb")
        self._pending: list[int] = []
        self._size = 0
        self._write_header()

    def append(self, item: int) -> None:
        """Adds one item."""
        self._pending.append(item)
        if len(self._pending) >= _FLUSH_ITEMS:
            self._flush()

    def extend(self, items: np.ndarray | bytes) -> None:
        """Adds an array of items (or, in a byte column, bytes)."""
        self._flush()
        items = np.frombuffer(items, np.uint8) if isinstance(items, bytes) else items
        self._file.write(np.ascontiguousarray(items, self._dtype))
        self._size += len(items)

    def close(self) -> None:
        """Writes what is pending and the final length."""
        self._flush()
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _flush(self) -> None:
        if self._pending:
            items, self._pending = np.array(self._pending, self._dtype), []
            self._file.write(items)
            self._size += len(items)

    def _write_header(self) -> None:
        # NumPy pads a header so that the first axis may grow in place: both headers are as long.
        header = {
            "descr": self._dtype.str,
            "fortran_order": False,
            "shape": (self._size, *self._row),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


class BytesColumn:
    """Byte strings end to end (`stem.npy`) and their offsets (`stem_offsets.npy`)."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._values = Column(folder / f"{stem}.npy", np.uint8)
        self._offsets = Column(folder / f"{stem}_offsets.npy", np.int64)
        self._pending: list[bytes] = []
        self._end = 0
        self._offsets.append(0)

    def __len__(self) -> int:
        return self._end

    def append(self, item: bytes) -> None:
        """Adds one string."""
        self._pending.append(item)
        self._end += len(item)
        self._offsets.append(self._end)
        if len(self._pending) >= _FLUSH_ITEMS:
            self._flush()

    def close(self) -> None:
        """Finishes both files."""
        self._flush()
        self._values.close()
        self._offsets.close()

    def _flush(self) -> None:
        self._values.extend(b"".join(self._pending))
        self._pending = []


class BytesTable:
    """The byte strings that a `BytesColumn` wrote, memory-mapped."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._values = load_column(folder / f"{stem}.npy")
        self._offsets = load_column(folder / f"{stem}_offsets.npy")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> bytes:
        return self._values[self._offsets[i] : self._offsets[i + 1]].tobytes()

    def __iter__(self) -> Iterable[bytes]:
        return (self[i] for i in range(len(self)))


def load_column(path: Path) -> np.ndarray:
    """The array in `path`, memory-mapped read-only."""
    # A plain array over the map: indexing numpy.memmap itself costs a Python call each time.
    return np.asarray(np.load(path, mmap_mode="r"))
