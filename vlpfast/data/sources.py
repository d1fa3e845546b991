"""The rows of a data source, one at a time: JSONL, JSON, CSV, TSV or WebDataset tar shards.

Captions, questions and statements about one image or two, in the forms that data sets have. Images
are not opened here.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from vlpfast.data import vqa_files

IMAGE_KEYS = ("image", "filepath")
CAPTION_KEYS = ("captions", "caption", "title")
_IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
# Longer than any caption; a quote that is never closed makes one field of all that follows.
_MAX_CSV_FIELD = 2**24
# Of generated scenes: statements about pairs of images, which lie in the shards beside the table.
_SCENE_PAIRS = ".nlvr.jsonl"


class _MisfitError(ValueError):
    """A row has not the form of a sample."""


@dataclass
class SourceRow:
    """One sample as its source describes it.

    Attributes:
        name: path of the image file relative to the source's folder, or `member` in a shard.
        container: number of its shard in `containers(source)`; -1 for a loose file.
        offset, size: place of the image's bytes in the shard; 0, -1 for a loose file.
        captions: non-empty captions.
        record: the other fields.
        problem: why the row cannot be a sample; empty if it can.
        second: name and place of the second image, of a text about two; else None.
        misfit: the problem is one of form (no such key, a value of another type), which the other
            rows may well share.
    """

    name: str
    container: int = -1
    offset: int = 0
    size: int = -1
    captions: list[str] = field(default_factory=list)
    record: dict = field(default_factory=dict)
    problem: str = ""
    second: SourceRow | None = None
    misfit: bool = False

    @property
    def images(self) -> tuple[SourceRow, ...]:
        """What has name and place of each of its images."""
        return (self,) if self.second is None else (self, self.second)


def is_table(source: Path) -> bool:
    """Whether `source` is a table that names loose image files (else: tar shards)."""
    return source.suffix.lower() in _TABLES


def shards(source: Path) -> list[Path]:
    """The tar files in which images of `source` lie, by number."""
    if source.name.endswith(_SCENE_PAIRS):
        return sorted(source.parent.glob(f"{source.name.removesuffix(_SCENE_PAIRS)}-*.tar"))
    return [] if is_table(source) else containers(source)


def containers(source: Path) -> list[Path]:
    """The files of a source: the table with what belongs to it, the shard, or all shards of a
    folder in name order.
    """
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if source.is_dir():
        found = sorted(source.glob("*.tar"))
        if not found:
            raise ValueError(
                f"{source}: folder without *.tar shards; expected shards, or a path to a "
                ".jsonl, .json, .csv or .tsv file"
            )
        return found
    if not is_table(source) and source.suffix.lower() != ".tar":
        raise ValueError(
            f"{source}: unknown format; expected .tar, .jsonl, .json, .csv, .tsv or a folder"
        )
    return [source, *shards(source), *vqa_files.beside(source)] if is_table(source) else [source]


def hash_files(digest: hashlib._Hash, source: Path) -> None:
    """Takes the names and sizes of a source's files into `digest`. Modification times are left out:
    a copy of the data is the same data.
    """
    for path in containers(source):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())


def iter_rows(
    source: Path, *, image_key: str = "", caption_key: str = "", need_captions: bool = True
) -> Iterator[SourceRow]:
    """All rows of `source` in order; those that cannot be samples with their problem.

    Args:
        source: a table, a shard or a folder of shards.
        image_key, caption_key: column names in a table; empty takes the first of `IMAGE_KEYS`,
            `CAPTION_KEYS` that a row has.
        need_captions: a row without a place for captions has a problem.

    Raises:
        ValueError: already the first row has not the form of a sample.
    """
    rows = _rows(source, image_key, caption_key, need_captions)
    for number, row in enumerate(rows):
        if row.misfit and number == 0:
            options = "; --data.image-key and --data.caption-key name the columns"
            raise ValueError(f"{row.name}: {row.problem}{options if is_table(source) else ''}")
        yield row


def _rows(
    source: Path, image_key: str, caption_key: str, need_captions: bool
) -> Iterator[SourceRow]:
    if not is_table(source):
        for number, shard in enumerate(containers(source)):
            yield from _iter_shard(shard, number, need_captions)
        return
    images = (image_key,) if image_key else IMAGE_KEYS
    captions = (caption_key,) if caption_key else CAPTION_KEYS
    readers = {".csv": _iter_csv, ".tsv": _iter_csv, ".json": _iter_json}
    reader = readers.get(source.suffix.lower(), _iter_jsonl)
    members = _members(source) if source.name.endswith(_SCENE_PAIRS) else {}
    for place, fields in reader(source):
        try:
            if isinstance(fields, str):
                row = SourceRow(place, problem=fields)
            elif not isinstance(fields, dict):
                raise fields
            elif members:
                row = _scene_pair(fields, members)
            else:
                row = _table_row(fields, images, captions, need_captions)
            for image in row.images:
                os.fsencode(image.name)
        except _MisfitError as error:
            row = SourceRow(place, problem=str(error), misfit=True)
        except UnicodeEncodeError:
            row = SourceRow(place, problem="path is not UTF-8")
        yield row


def _table_row(
    fields: dict,
    image_keys: tuple[str, ...],
    caption_keys: tuple[str, ...],
    need_captions: bool,
) -> SourceRow:
    """Rows that show the same, by the names of their images, have one `image_id`, where they have
    no captions and none of their own.
    """
    pair = "images" in fields and not set(image_keys) & fields.keys()
    image_key = "images" if pair else _first_key(fields, image_keys, "an image path")
    names = fields[image_key] if pair else [fields[image_key]]
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise _MisfitError(f"{image_key!r} must be a path, got {fields[image_key]!r}")
    if len(names) != 1 + pair:
        raise _MisfitError(f"'images' must be two paths, got {names!r}")
    caption_key = next((key for key in caption_keys if key in fields), "")
    if not caption_key and need_captions:
        _first_key(fields, caption_keys, "a caption")
    used = {image_key, caption_key}
    record = {key: value for key, value in fields.items() if key not in used}
    captions, problem = [], ""
    if caption_key:
        captions, problem = _clean_captions(caption_key, fields[caption_key])
    if not captions and not need_captions and record.get("image_id") in (None, ""):
        record["image_id"] = " ".join(names)
    second = SourceRow(names[1]) if pair else None
    return SourceRow(names[0], captions=captions, record=record, problem=problem, second=second)


def _members(source: Path) -> dict[str, SourceRow]:
    """The images in the shards of `source`, by their names without extension."""
    rows = (row for n, shard in enumerate(shards(source)) for row in _iter_shard(shard, n, False))
    # Without their captions and records, which would be most of the memory.
    return {row.name.partition(".")[0]: replace(row, captions=[], record={}) for row in rows}


def _scene_pair(fields: dict, members: dict[str, SourceRow]) -> SourceRow:
    """A statement about two generated scenes."""
    for key in ("left", "right", "statement", "label"):
        _first_key(fields, (key,), "a scene or what is said of two")
    names = [fields[side] for side in ("left", "right")]
    for name in names:
        if not isinstance(name, str):
            raise _MisfitError(f"'left' and 'right' must be names of scenes, got {names!r}")
        if name not in members:
            return SourceRow(name, problem=f"no image {name!r} in the shards beside the table")
    left, right = (members[name] for name in names)
    record = {"sentence": fields["statement"], "label": fields["label"]}
    record["image_id"] = " ".join(names)
    second = SourceRow(right.name, right.container, right.offset, right.size)
    row = SourceRow(left.name, left.container, left.offset, left.size, [], record)
    return replace(row, problem=left.problem or right.problem, second=second)


def _first_key(fields: dict, keys: tuple[str, ...], meaning: str) -> str:
    for key in keys:
        if key in fields:
            return key
    expected = " or ".join(repr(key) for key in keys)
    raise _MisfitError(f"no key with {meaning}: expected {expected}, found {sorted(fields)}")


def _clean_captions(key: str, value: object) -> tuple[list[str], str]:
    """Non-empty captions and the problem of the row, if it has one. JSON's null is no caption."""
    values = value if isinstance(value, list) else [value]
    values = [v for v in values if v is not None]
    if not all(isinstance(v, str) for v in values):
        raise _MisfitError(f"{key!r} must be a string or a list of strings, got {value!r}")
    captions = [text for v in values if (text := v.strip())]
    for text in captions:
        if any("\ud800" <= c <= "\udfff" for c in text):
            return [], "caption is not UTF-8"
    return captions, ""


# A reader yields the place of each row, and its fields or why it has none.
_Fields = dict | str | _MisfitError


def _iter_jsonl(source: Path) -> Iterator[tuple[str, _Fields]]:
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{source}:{number}"
            try:
                fields = json.loads(line)
            except UnicodeDecodeError:
                yield place, "line is not UTF-8"
                continue
            except (ValueError, RecursionError) as error:
                yield place, _MisfitError(f"not JSON: {error}")
                continue
            yield place, _as_dict(fields)


def _iter_json(source: Path) -> Iterator[tuple[str, _Fields]]:
    try:
        rows = json.loads(source.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{source}: not JSON: {error}") from error
    if isinstance(rows, dict) and "questions" in rows:
        rows = vqa_files.questions(source, rows)
    if not isinstance(rows, list):
        raise ValueError(f"{source}: expected a list of objects, found {type(rows).__name__}")
    for number, fields in enumerate(rows):
        yield f"{source}[{number}]", _as_dict(fields)


def _as_dict(fields: object) -> dict | _MisfitError:
    if not isinstance(fields, dict):
        return _MisfitError(f"expected a JSON object, found {type(fields).__name__}")
    return fields


def _iter_csv(source: Path) -> Iterator[tuple[str, _Fields]]:
    # Files of tab-separated values quote nothing: a caption may begin with a quotation mark.
    tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    form = tabs if source.suffix.lower() == ".tsv" else {}
    # surrogateescape keeps undecodable bytes, which the caption check then names.
    with source.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file, **form)
        csv.field_size_limit(max(csv.field_size_limit(), _MAX_CSV_FIELD))
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"{source}:{reader.reader.line_num}", f"row cannot be read: {error}"
                continue
            place = f"{source}:{reader.line_num}"
            if None in fields or None in fields.values():
                yield place, f"row does not have {len(reader.fieldnames or ())} columns"
            else:
                yield place, fields


def _iter_shard(shard: Path, container: int, need_captions: bool) -> Iterator[SourceRow]:
    """The samples of one shard: adjacent members of one stem, image + .txt and/or .json."""
    end = shard.stat().st_size
    row, texts, stem = None, {}, None

    def finish(row: SourceRow | None, texts: dict[str, bytes], stem: tuple[str, str]) -> SourceRow:
        name = f"{shard.name}/{'/'.join(filter(None, stem))}"
        return _shard_row(row, texts, name, need_captions)

    try:
        with tarfile.open(shard, "r:") as tar, shard.open("rb") as file:
            for member in tar:
                tar.members = []  # tarfile would keep every member ever seen
                if not member.isreg():
                    continue
                folder, _, base = member.name.rpartition("/")
                member_stem, _, extension = base.partition(".")
                if (folder, member_stem) != stem:
                    if stem is not None:
                        yield finish(row, texts, stem)
                    row, texts, stem = None, {}, (folder, member_stem)
                if extension.lower() in _IMAGE_EXTENSIONS:
                    row = SourceRow(member.name, container, member.offset_data, member.size)
                    if member.offset_data + member.size > end:
                        row.problem = f"shard is cut at byte {end}, inside this image"
                elif extension.lower() in ("txt", "json"):
                    file.seek(member.offset_data)
                    texts[extension.lower()] = file.read(member.size)
                    if member.offset_data + member.size > end:
                        reason = f"shard is cut at byte {end}, inside a text of this sample"
                        row = SourceRow(row.name if row else member.name, problem=reason)
            if stem is not None:
                yield finish(row, texts, stem)
            if reason := _after_members(file, tar.offset):
                yield SourceRow(
                    shard.name,
                    problem=f"shard cannot be read beyond byte {tar.offset} of {end}: {reason}",
                )
    except tarfile.TarError as error:
        if stem is not None:
            yield finish(row, texts, stem)
        yield SourceRow(shard.name, problem=f"shard cannot be read to its end: {error}")


def _after_members(file: BinaryIO, offset: int) -> str:
    """Why the members of a tar do not end at `offset`; empty if they do.

    For tarfile a damaged header, a lone block of zeros and the end of the file are an end, too.
    """
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        return "the member header there is damaged or cut"
    # Tools pad differently: one block of zeros is the least that an archive ends with.
    if len(block) < tarfile.BLOCKSIZE:
        return "it is cut there, without an end marker"
    while chunk := file.read(2**20):
        if chunk.strip(b"\0"):
            return "there is data behind the end marker (archives end to end?)"
    return ""


def _shard_row(
    row: SourceRow | None, texts: dict[str, bytes], name: str, need_captions: bool
) -> SourceRow:
    if row is None:
        return SourceRow(name, problem=f"no image: expected one of {', '.join(_IMAGE_EXTENSIONS)}")
    if row.problem:
        return row
    try:
        fields = json.loads(texts["json"]) if "json" in texts else {}
        text = texts["txt"].decode() if "txt" in texts else None
    except UnicodeDecodeError:
        row.problem = "caption is not UTF-8"
        return row
    except (ValueError, RecursionError) as error:
        row.problem = f".json is not JSON: {error}"
        return row
    if not isinstance(fields, dict):
        row.problem = ".json is not an object"
        return row
    if not texts:
        row.problem = "no caption: no .txt or .json beside the image (members must be adjacent)"
        return row
    key = next((k for k in CAPTION_KEYS[:2] if k in fields), "")
    if text is None and not key and need_captions:
        row.problem = f".json has no 'caption' or 'captions' key, found {sorted(fields)}"
        row.misfit = True
        return row
    value = fields.pop(key) if key else []
    try:
        row.captions, row.problem = _clean_captions(key or "txt", text or value)
    except _MisfitError as error:
        row.problem, row.misfit = str(error), True
    row.record = fields
    return row
