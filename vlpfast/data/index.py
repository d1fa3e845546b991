"""The validated index of a data source: where each image lies and what is said of it.

Built once beside the source (`<source>.index/`); holds valid samples only, invalid ones are listed
with their reason.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from vlpfast.data.build import (
    BYTES,
    COLUMNS,
    FORMAT_VERSION,
    SECOND,
    SECOND_NAMES,
    WITHOUT_CAPTIONS,
    atomic,
    build_tables,
    fingerprint,
    is_identity,
    locked,
    read_meta,
    row_identity,
    stable_id,
)
from vlpfast.data.tables import BytesTable, Column, load_column
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.ragged import Ragged

_CHUNK = 1024
_LOG = logging.getLogger("vlpfast.data")


@dataclass(frozen=True)
class TokenTable:
    """Token ids of every caption of an index.

    Attributes:
        values (T,): int32 token ids, end to end.
        offsets (C + 1,): int64; caption c is `values[offsets[c]:offsets[c + 1]]`.
    """

    values: np.ndarray
    offsets: np.ndarray

    def ragged(self, caption_ids: np.ndarray) -> Ragged:
        """Captions `caption_ids` (B,) packed in that order, int64 values."""
        starts = self.offsets[caption_ids]
        lens = self.offsets[caption_ids + 1] - starts
        cu_seqlens = np.concatenate([[0], lens.cumsum()])
        token_ids = np.arange(cu_seqlens[-1]) + (starts - cu_seqlens[:-1]).repeat(lens)
        values = torch.from_numpy(self.values[token_ids].astype(np.int64))
        max_len = int(lens.max()) if len(lens) else 0
        return Ragged(values, torch.from_numpy(cu_seqlens.astype(np.int32)), max_len)


@dataclass(frozen=True)
class Index:
    """Samples of one source, or a selection of them; made by `open`, `build` or `where`.

    Attributes:
        source: the data: a table of loose files, a shard or a folder of shards.
        folder: where the tables are.
        tables: column name -> array over all samples of the source.
        rows (N,): the samples of this selection, as rows of the tables; sample i of the index is
            row `rows[i]`.
    """

    source: Path
    folder: Path
    tables: Mapping[str, np.ndarray]
    strings: Mapping[str, BytesTable]
    rows: np.ndarray | range

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        index_dir: str | Path | None = None,
        id_key: str = "",
        image_key: str = "",
        caption_key: str = "",
        verify: str = "header",
        require_captions: bool = True,
        allow_empty: bool = False,
    ) -> Index:
        """The index of `path`; built first if there is none or the source has changed since.

        Args:
            path: folder of *.tar shards, .tar, .jsonl, .json, .csv or .tsv; among these VQA v2's
                questions, and pairs of generated scenes, `SPLIT.nlvr.jsonl`.
            index_dir: folder of the tables; `<path>.index` if None.
            id_key: record field whose value is the sample's identity (`image_ids`); empty takes the
                field `image_id`, or where no row has one the sample's own number. A row in which it
                is null or empty is like no other.
            image_key, caption_key: column names in a table; empty takes image | filepath, captions
                | caption | title.
            verify: "header" checks header and end marker, "decode" decodes every image.
            require_captions: a sample without a caption is invalid.
            allow_empty: an index without a valid sample is no error.
        """
        source = Path(path).absolute()
        folder = Path(index_dir) if index_dir else source.with_name(source.name + ".index")
        options = {
            "image_key": image_key,
            "caption_key": caption_key,
            "verify": verify,
            "require_captions": require_captions,
        }
        meta = {"version": FORMAT_VERSION, "fingerprint": fingerprint(source), **options}
        with locked(folder):
            found = read_meta(folder)
            # An index whose images were all decoded also serves who asks for less.
            if found.get("verify") == "decode":
                found["verify"] = verify
            # Where every row has a caption, it is all the same whether one was asked for.
            if found.pop(WITHOUT_CAPTIONS, 1) == 0:
                found["require_captions"] = require_captions
            if found != meta:
                if found:
                    changed = sorted(k for k in meta if found.get(k) != meta[k])
                    _LOG.warning("%s is stale (%s changed): rebuilding", folder, ", ".join(changed))
                build_tables(source, folder, meta, **options)
        index = cls._load(source, folder)
        if not index.num_samples and not allow_empty:
            reason = next((f"{n}: {r}" for n, r in index.invalid.items()), "it is empty")
            raise ValueError(f"{source}: no valid sample; first reason: {reason}")
        return index.with_ids(id_key)

    @classmethod
    def build(cls, source: str | Path, out: str | Path | None = None, **options) -> Index:
        """Like `open`, but builds the index anew in any case."""
        source = Path(source).absolute()
        folder = Path(out) if out else source.with_name(source.name + ".index")
        with locked(folder):
            (folder / "meta.json").unlink(missing_ok=True)
        return cls.open(source, index_dir=folder, **options)

    @classmethod
    def _load(cls, source: Path, folder: Path) -> Index:
        tables = {name: load_column(folder / f"{name}.npy") for name in COLUMNS}
        strings = {name: BytesTable(folder, name) for name in BYTES}
        if (folder / f"{SECOND_NAMES}.npy").exists():
            tables |= {name: load_column(folder / f"{name}.npy") for name in SECOND}
            strings[SECOND_NAMES] = BytesTable(folder, SECOND_NAMES)
        return cls(source, folder, tables, strings, range(len(tables["size"])))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_samples(self) -> int:
        """Number of valid samples."""
        return len(self.rows)

    @property
    def num_captions(self) -> int:
        """Number of captions of all samples of the source."""
        return len(self.strings["captions"])

    @property
    def image_ids(self) -> np.ndarray:
        """(N,) int64 identity of each sample's image or concept."""
        return self.column("image_ids")

    @property
    def invalid(self) -> dict[str, str]:
        """Name -> reason of the samples that were left out when the index was built."""
        names, reasons = self.strings["invalid_names"], self.strings["invalid_reasons"]
        pairs = zip(names, reasons, strict=True)
        return {os.fsdecode(name): reason.decode() for name, reason in pairs}

    @property
    def has_pairs(self) -> bool:
        """Whether its texts are about two images each."""
        return SECOND_NAMES in self.strings

    @property
    def second(self) -> Index:
        """The same samples, their second images in the place of the first."""
        tables = {name.removeprefix("second_"): self.tables[name] for name in SECOND}
        strings = {**self.strings, "names": self.strings[SECOND_NAMES]}
        return replace(self, tables={**self.tables, **tables}, strings=strings)

    def column(self, name: str) -> np.ndarray:
        """(N,) column `name` of this selection, one of `build.COLUMNS`."""
        table = self.tables[name]
        return table if isinstance(self.rows, range) else table[self.rows]

    def at(self, name: str, samples: np.ndarray) -> np.ndarray:
        """Column `name` at samples (B,), without reading the whole column."""
        return self.tables[name][self.rows_of(samples)]

    def name(self, i: int) -> str:
        """Readable name of sample `i`: its path, or `shard.tar/member`."""
        row = self.rows[i]
        name = os.fsdecode(self.strings["names"][row])
        container = self.tables["container"][row]
        return name if container < 0 else f"{self.strings['containers'][container].decode()}/{name}"

    def captions(self, i: int) -> list[str]:
        """All captions of sample `i`."""
        start, end = self.tables["caption_starts"][self.rows[i] : self.rows[i] + 2]
        return [self.strings["captions"][c].decode() for c in range(start, end)]

    def record(self, i: int) -> dict:
        """The other fields of sample `i`."""
        return json.loads(self.strings["records"][self.rows[i]])

    def image_bytes(self, i: int) -> bytes:
        """Encoded image of sample `i`."""
        row = self.rows[i]
        container = self.tables["container"][row]
        if container < 0:
            name = os.fsdecode(self.strings["names"][row])
            return (self.source.parent / name).read_bytes()
        folder = self.source if self.source.is_dir() else self.source.parent
        with open(folder / self.strings["containers"][container].decode(), "rb") as file:
            file.seek(self.tables["offset"][row])
            return file.read(self.tables["size"][row])

    def caption_ranges(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First caption id and number of captions of samples (B,)."""
        rows = self.rows_of(samples)
        starts = self.tables["caption_starts"]
        return starts[rows], starts[rows + 1] - starts[rows]

    def where(self, conditions: Mapping[str, str | Sequence[str]]) -> Index:
        """The samples whose record fields have the given values.

        Args:
            conditions: field -> value, or several values of which one must match. Values are
                compared as text; a field that holds a list matches if it contains the value.
        """
        if not conditions:
            return self
        wanted = {k: {v} if isinstance(v, str) else set(v) for k, v in conditions.items()}

        def matches(row: int) -> bool:
            record = json.loads(self.strings["records"][row])
            return all(values & _texts(record.get(key)) for key, values in wanted.items())

        rows = np.fromiter((row for row in self.rows if matches(row)), np.int64)
        if not len(rows):
            known = sorted(self.record(0))
            raise ValueError(f"{self.source}: no sample has {dict(conditions)}; fields are {known}")
        return replace(self, rows=rows)

    def with_ids(self, id_key: str) -> Index:
        """The same samples, identified by the record field `id_key` (empty: as built)."""
        if not id_key:
            return self
        path = self.folder / f"image_ids-{hashlib.sha256(id_key.encode()).hexdigest()[:16]}.npy"
        if not path.exists():
            with locked(path):
                if not path.exists():
                    self._write_ids(path, id_key)
        return replace(self, tables={**self.tables, "image_ids": load_column(path)})

    def iter_captions(self) -> Iterator[str]:
        """All captions of this selection, in order."""
        return itertools.chain.from_iterable(self.captions(i) for i in range(len(self)))

    def tokens(self, tokenizer: Tokenizer, max_tokens: int) -> TokenTable:
        """Token ids of all captions of the source; made once, cached by the tokenizer's hash."""
        stem = f"tokens-{tokenizer.sha256[:16]}-{max_tokens}"
        values_path, offsets_path = (self.folder / f"{stem}{s}.npy" for s in ("", "-offsets"))
        paths = (values_path, offsets_path)
        if not all(path.exists() for path in paths):
            with locked(values_path), locked(offsets_path):
                if not all(path.exists() for path in paths):
                    self._write_tokens(*paths, tokenizer, max_tokens)
        return TokenTable(load_column(values_path), load_column(offsets_path))

    def _write_ids(self, path: Path, id_key: str) -> None:
        with atomic(path) as temporary:
            column = Column(temporary, np.int64)
            for row, record in enumerate(self.strings["records"]):
                fields = json.loads(record)
                if id_key not in fields:
                    raise ValueError(
                        f"{self.source}: sample {self.name(row)} has no field {id_key!r}, "
                        f"found {sorted(fields)}"
                    )
                given = is_identity(fields[id_key])
                column.append(stable_id(fields[id_key]) if given else row_identity(row))
            column.close()

    def _write_tokens(
        self, values_path: Path, offsets_path: Path, tokenizer: Tokenizer, max_tokens: int
    ) -> None:
        with atomic(values_path) as v_path, atomic(offsets_path) as o_path:
            values, offsets = Column(v_path, np.int32), Column(o_path, np.int64)
            offsets.append(0)
            end = 0
            captions = iter(self.strings["captions"])
            while chunk := list(itertools.islice(captions, _CHUNK)):
                ids = tokenizer.encode([c.decode() for c in chunk], max_tokens)
                values.extend(np.fromiter(itertools.chain.from_iterable(ids), np.int32))
                ends = end + np.cumsum([len(i) for i in ids])
                offsets.extend(ends)
                end = int(ends[-1])
            values.close()
            offsets.close()

    def rows_of(self, samples: np.ndarray) -> np.ndarray:
        """Rows of the tables of samples (B,)."""
        return samples if isinstance(self.rows, range) else self.rows[samples]


def _texts(value: object) -> set[str]:
    values = value if isinstance(value, list) else [value]
    return {v if isinstance(v, str) else json.dumps(v) for v in values}
