"""Scenes as WebDataset shards: PNG + JSON per sample, image pairs beside them.

The same arguments give the same bytes.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from tqdm import trange

from vlpfast.data.scenes.noise import noisy_captions
from vlpfast.data.scenes.pairs import image_pair
from vlpfast.data.scenes.render import render
from vlpfast.data.scenes.siblings import sample_sibling
from vlpfast.data.scenes.space import HELD_OUT, SPLITS, Scene, Split, sample_scene
from vlpfast.data.scenes.text import ANSWERS, record


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of an (H, W, 3) uint8 image: rows as differences to the row above, zlib level 1."""
    height, width, _ = image.shape
    rows = image.reshape(height, width * 3)
    filtered = np.empty((height, 1 + width * 3), dtype=np.uint8)
    filtered[:, 0] = 2
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            _chunk(b"IDAT", zlib.compress(filtered.tobytes(), 1)),
            _chunk(b"IEND", b""),
        ]
    )


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(data))


def write_shards(
    out: Path | str,
    *,
    num_samples: int,
    split: Split = "train",
    image_size: int = 64,
    seed: int = 0,
    num_pairs: int = 0,
    siblings: float = 0.0,
    noise: float = 0.0,
    samples_per_shard: int = 10_000,
    progress: bool = True,
) -> dict[str, object]:
    """Writes samples 0 .. num_samples - 1 of a split to `out`/SPLIT-000000.tar, ...

    A sample is NUMBER.png + NUMBER.json (`record`). Beside the shards: SPLIT.nlvr.jsonl with
    `num_pairs` image pairs, and SPLIT.info.json, the returned summary. A shard appears under its
    name only when it is complete.

    Args:
        out: folder, made if missing; its files of the same names are replaced.
        num_samples: images.
        split: "train", "val" or "heldout".
        image_size: side of the square images, pixels.
        seed: same seed, same set.
        num_pairs: image pairs for NLVR.
        siblings: this share of odd samples are siblings of those before them (`sample_siblings`).
        noise: this share of samples have another image's captions (`noisy_captions`). Each record
            then says in `noisy` whether it has; everything else in it stays true of the image.
        samples_per_shard: images per tar.
        progress: show a bar, where the output is a terminal.
    Returns: split, num_samples, num_pairs, image_size, seed, siblings, noise, num_noisy, shards,
        num_duplicates (samples whose description an earlier one has), held_out (combinations),
        answers (the VQA vocabulary).
    """
    _check(num_samples, samples_per_shard, siblings, noise)
    sample = functools.partial(sample_sibling, share=siblings) if siblings else sample_scene
    fields_of = functools.partial(_fields, noise=noise, num_samples=num_samples, sample=sample)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f"{split}-??????.tar"):
        stale.unlink()
    seen: set[int] = set()
    shards, num_noisy = [], 0
    numbers = trange(
        num_samples, desc=f"scenes {split}", unit="img", disable=None if progress else True
    )
    steps = iter(numbers)
    for shard, start in enumerate(range(0, num_samples, samples_per_shard)):
        path = folder / f"{split}-{shard:06d}.tar"
        count = min(samples_per_shard, num_samples - start)
        scenes = (sample(seed, split, number) for number in itertools.islice(steps, count))
        ids, noisy = _write_shard(path, scenes, fields_of, image_size)
        seen |= ids
        num_noisy += noisy
        shards.append(path.name)
    next(steps, None)  # lets the bar close
    if num_pairs:
        lines = [
            _json(image_pair(seed, split, i, num_samples, sample=sample)) for i in range(num_pairs)
        ]
        (folder / f"{split}.nlvr.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    summary: dict[str, object] = {
        "split": split,
        "num_samples": num_samples,
        "num_pairs": num_pairs,
        "image_size": image_size,
        "seed": seed,
        "siblings": siblings,
        "noise": noise,
        "num_noisy": num_noisy,
        "shards": shards,
        "num_duplicates": num_samples - len(seen),
        "held_out": [" ".join((color, shape)) for shape, color in HELD_OUT],
        "answers": ANSWERS,
    }
    (folder / f"{split}.info.json").write_bytes(_json(summary))
    return summary


def _check(num_samples: int, samples_per_shard: int, siblings: float, noise: float) -> None:
    for name, value in {"num_samples": num_samples, "samples_per_shard": samples_per_shard}.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    for name, value in {"siblings": siblings, "noise": noise}.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a share in [0, 1], got {value}")
    if siblings and num_samples % 2:
        raise ValueError(f"num_samples: expected an even number with siblings, got {num_samples}")


def _fields(
    scene: Scene, *, noise: float, num_samples: int, sample: Callable[[int, Split, int], Scene]
) -> dict[str, object]:
    """The record of a scene; with noise it says whether it has another's captions."""
    fields = record(scene)
    if not noise:
        return fields
    captions = noisy_captions(scene, noise, num_samples, sample=sample)
    return fields | {"noisy": captions is not None} | ({"captions": captions} if captions else {})


def _write_shard(
    path: Path,
    scenes: Iterable[Scene],
    fields_of: Callable[[Scene], dict[str, object]],
    image_size: int,
) -> tuple[set[int], int]:
    """Writes one shard; the ids of its scenes, and how many are noisy."""
    ids, num_noisy = set(), 0
    partial = path.with_suffix(".tar.partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for scene in scenes:
            fields = fields_of(scene)
            ids.add(scene.image_id)
            num_noisy += fields.get("noisy", False)
            _add(tar, f"{scene.number:09d}.png", encode_png(render(scene, image_size)))
            _add(tar, f"{scene.number:09d}.json", _json(fields))
    partial.replace(path)
    return ids, num_noisy


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def make(
    out: Path | str,
    num_samples: int,
    *,
    val_samples: int = 1000,
    heldout_samples: int = 1000,
    image_size: int = 64,
    siblings: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, dict[str, object]]:
    """Writes `out`/train, `out`/val and `out`/heldout, each with half as many pairs as images.

    A split with 0 samples is left out; one with fewer than 100 gets no pairs. `siblings` and
    `noise` are of the training split alone.

    Returns: split -> the summary of `write_shards`.
    """
    counts = dict(zip(SPLITS, (num_samples, val_samples, heldout_samples), strict=True))
    return {
        split: write_shards(
            Path(out) / split,
            num_samples=count,
            split=split,
            image_size=image_size,
            seed=seed,
            num_pairs=count // 2 if count >= 100 else 0,
            siblings=siblings if split == "train" else 0.0,
            noise=noise if split == "train" else 0.0,
            progress=progress,
        )
        for split, count in counts.items()
        if count
    }
