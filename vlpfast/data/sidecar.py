"""Files beside a data set, one for each of its shards, and a description of what made them.

What is there for a shard is whole; so work on a data set can be stopped and shared out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlpfast.data.build import atomic, locked
from vlpfast.data.index import Index
from vlpfast.data.sources import hash_files

# Rows of a part where the source is a table.
PART_ROWS = 100_000
# Of the corrupt samples, how many the description names; each shard's own file names all of its.
NAMED = 20
# What these are called may change with the place of runs and data; what they are may not.
_PATHS = ("run", "weights", "captioner", "captioner_weights", "data")


@dataclass(frozen=True)
class Part:
    """Rows `first` to `last` - 1 of an index's tables: a shard's, or a stretch of a table's."""

    name: str
    first: int
    last: int

    @property
    def num_rows(self) -> int:
        """How many they are."""
        return self.last - self.first


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
    """Hash of the names and sizes of a source's files."""
    digest = hashlib.sha256()
    hash_files(digest, source)
    return digest.hexdigest()


@dataclass(frozen=True)
class Sidecar:
    """For each part S of a data set a file S + `suffix` and a summary S.json; and `kind`.json, the
    description of all.
    """

    folder: Path
    kind: str
    suffix: str

    def path(self, chosen: Part) -> Path:
        """The file of a part."""
        return self.folder / f"{chosen.name}{self.suffix}"

    def begin(self, index: Index, made_by: Mapping[str, object]) -> None:
        """Says in a new folder what will be in it, or sees that an old one has the same.

        Args:
            index: of the whole source.
            made_by: all that decides what is written, as JSON values.

        Raises:
            ValueError: the folder has something else.
        """
        wanted = {
            **made_by,
            "data": str(index.source),
            "data_sha256": source_sha256(index.source),
            "num_samples": len(index.tables["size"]),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self._description):
            if not self._description.exists():
                write_json(self._description, wanted)
                return
            found = self.description()
            for name in sorted(set(wanted) - set(_PATHS)):
                if found.get(name) != wanted[name]:
                    raise ValueError(
                        f"{self.folder} holds {self.kind} of {name} {found.get(name)!r}, expected "
                        f"{wanted[name]!r}: name another folder"
                    )

    def is_finished(self, chosen: Part) -> bool:
        """Whether a part has its file."""
        return self.path(chosen).exists()

    def summary(self, chosen: Part) -> dict:
        """What was written beside a finished part's file."""
        return json.loads(self.path(chosen).with_name(f"{chosen.name}.json").read_text())

    def write_summary(self, chosen: Part, summary: Mapping[str, object]) -> None:
        """To be called before the file is written, which says that the part is finished."""
        write_json(self.folder / f"{chosen.name}.json", summary)

    def finish(self, totals: Mapping[str, object]) -> dict[str, object]:
        """Adds the totals of all parts to the description and returns it."""
        done = self.description() | dict(totals)
        write_json(self._description, done)
        return done

    def description(self) -> dict[str, object]:
        """What the description says.

        Raises:
            ValueError: it is not there.
        """
        try:
            return json.loads(self._description.read_text())
        except FileNotFoundError as error:
            name = self._description.name
            raise ValueError(
                f"{self.folder} is no folder of {self.kind}: it has no {name}"
            ) from error

    def identity(self) -> str:
        """Hash of what decides what is here, not of where it and its data are."""
        found = {k: v for k, v in self.description().items() if k not in _PATHS}
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()

    def check_data(self, index: Index) -> None:
        """Raises ValueError where this is not of the source of `index`."""
        found, num_samples = self.description(), len(index.tables["size"])
        if found["num_samples"] != num_samples:
            raise ValueError(
                f"{self.folder} has {self.kind} of {found['num_samples']} samples, {index.source} "
                f"has {num_samples}: they are of other data ({found['data']})"
            )
        if found["data_sha256"] != source_sha256(index.source):
            raise ValueError(
                f"{self.folder} has {self.kind} of {found['data']}, whose files have other names "
                f"or sizes than those of {index.source}"
            )

    def need(self, chosen: Part, command: str) -> Path:
        """The file of a part; ValueError where `command` has not come to it."""
        path = self.path(chosen)
        if not path.exists():
            raise ValueError(f"{self.folder} has no {path.name}: run `{command}` to its end")
        return path

    @property
    def _description(self) -> Path:
        return self.folder / f"{self.kind}.json"


def write_json(path: Path, value: object) -> None:
    """As a whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")
