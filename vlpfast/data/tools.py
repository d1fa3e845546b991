"""What `vlpfast data check` and `vlpfast data pack` do."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from vlpfast.data.build import is_identity
from vlpfast.data.index import Index

_EXTENSIONS = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))
_NUM_DIGITS = 9


def check(
    path: str | Path,
    *,
    verify: str = "decode",
    index_dir: str | Path | None = None,
    image_key: str = "",
    caption_key: str = "",
    require_captions: bool = True,
) -> dict[str, object]:
    """Reads every sample of `path` anew, which also rebuilds its index.

    Args: as `Index.open`; `verify="decode"` decodes every image.

    Returns: source, num_samples (valid), num_captions, num_image_ids, image_mib (encoded),
        min_side, max_side (pixels), num_corrupt, and corrupt: name -> reason.
    """
    index = Index.build(
        path,
        index_dir,
        verify=verify,
        image_key=image_key,
        caption_key=caption_key,
        require_captions=require_captions,
        allow_empty=True,
    )
    sides = [int(v) for n in ("width", "height") for v in index.column(n)]
    corrupt = index.invalid
    return {
        "source": str(path),
        "num_samples": index.num_samples,
        "num_captions": index.num_captions,
        "num_image_ids": len(set(index.image_ids.tolist())),
        "image_mib": round(int(index.column("size").sum()) / 2**20, 3),
        "min_side": min(sides, default=0),
        "max_side": max(sides, default=0),
        "num_corrupt": len(corrupt),
        "corrupt": corrupt,
    }


def pack(
    source: str | Path,
    out: str | Path,
    *,
    samples_per_shard: int = 10_000,
    max_shard_mb: float = 1000.0,
    image_key: str = "",
    caption_key: str = "",
    verify: str = "header",
    require_captions: bool = True,
) -> dict[str, object]:
    """Writes the valid samples of `source` as WebDataset shards, and the index of the shards.

    A sample is NUMBER.jpg|png|webp, the encoded image unchanged, and NUMBER.json: its captions, its
    image_id and all other fields. A shard gets its name when it is whole.

    Args:
        source: any source that `Index.open` takes.
        out: folder; made if missing, must hold no shards.
        samples_per_shard, max_shard_mb: the next shard begins after this many samples or 1e6 bytes.
        image_key, caption_key, verify, require_captions: as in `Index.open`.

    Returns: out, num_shards, num_samples, num_corrupt, and corrupt: name -> reason.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be >= 1, got {samples_per_shard}")
    if max_shard_mb <= 0:
        raise ValueError(f"max_shard_mb must be > 0, got {max_shard_mb}")
    out = Path(out)
    index = Index.open(
        source,
        image_key=image_key,
        caption_key=caption_key,
        verify=verify,
        require_captions=require_captions,
    )
    if index.has_pairs:
        raise ValueError(f"{source}: texts about two images each cannot be packed into shards")
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("*.tar")):
        raise ValueError(f"{out}: already holds shards; expected a new or empty folder")
    samples, num_shards = _members(index), 0
    sample = next(samples, None)
    while sample is not None:
        path = out / f"{num_shards:06d}.tar"
        partial = path.with_suffix(".tar.partial")
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for _ in range(samples_per_shard):
                for name, data in sample:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                sample = next(samples, None)
                if sample is None or tar.offset >= max_shard_mb * 1e6:
                    break
        os.replace(partial, path)
        num_shards += 1
    packed = Index.open(out, verify=verify, require_captions=require_captions)
    corrupt = index.invalid
    return {
        "out": str(out),
        "num_shards": num_shards,
        "num_samples": packed.num_samples,
        "num_corrupt": len(corrupt),
        "corrupt": corrupt,
    }


def _members(index: Index) -> Iterator[list[tuple[str, bytes]]]:
    """Image and JSON member of each sample."""
    for i in range(index.num_samples):
        image = index.image_bytes(i)
        extension = next((e for magic, e in _EXTENSIONS if image.startswith(magic)), "")
        if not extension:
            raise ValueError(f"{index.name(i)}: shards hold JPEG, PNG or WebP, got {image[:4]!r}")
        fields = {**index.record(i), "captions": index.captions(i)}
        if not is_identity(fields.get("image_id")):
            fields["image_id"] = int(index.image_ids[i])
        stem = f"{i:0{_NUM_DIGITS}d}"
        yield [
            (f"{stem}.{extension}", image),
            (f"{stem}.json", json.dumps(fields, ensure_ascii=False).encode()),
        ]
