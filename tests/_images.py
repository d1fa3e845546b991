"""Small images of every mode, and the sources that hold them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """A smooth RGB picture with some sharp edges, different for each seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    pixels = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    pixels[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def encode(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    """Encoded bytes of `image`."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_jsonl(path: Path, rows: Sequence[dict]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_set(folder: Path, num_samples: int, *, width: int = 40, height: int = 32) -> Path:
    """`folder`/set.jsonl: PNG images, 1 to 3 captions each, fields `number` and `parity`."""
    rows = []
    for i in range(num_samples):
        (folder / f"{i}.png").write_bytes(encode(picture(i, width, height), "PNG"))
        captions = [f"caption {c} of picture {i}" for c in range(1 + i % 3)]
        parity = "odd" if i % 2 else "even"
        rows.append({"image": f"{i}.png", "captions": captions, "number": i, "parity": parity})
    return write_jsonl(folder / "set.jsonl", rows)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], format: int | None = None) -> Path:
    """A tar of `members` (name, bytes) in order."""
    format = tarfile.PAX_FORMAT if format is None else format
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
