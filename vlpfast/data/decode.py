"""Encoded bytes to RGB pixels by Pillow, and the header checks of the index."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "linear": Image.Resampling.BILINEAR}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_ORIENTATION = 0x0112
_TRANSPOSED = (5, 6, 7, 8)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_rgb(data: bytes) -> Image.Image:
    """RGB image of any encoded image: EXIF orientation applied, alpha composed on white.

    CMYK and palettes are converted by Pillow; 16-bit grey keeps its upper 8 bits; of an animation
    the first frame is taken. Raises ValueError with the reason on bytes that are no whole image.
    """
    try:
        return _decode_rgb(data)
    # On damaged bytes Pillow raises errors of many types, struct.error and TypeError among them.
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _decode_rgb(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    image.load()
    # Not ImageOps.exif_transpose: it writes the EXIF anew, which fails on tags of odd types.
    if (orientation := _orientation(image)) != 1:
        image = image.transpose(_TURNS[orientation])
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        return Image.fromarray((wide >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def inspect(data: bytes, *, full: bool = False) -> tuple[int, int, bool]:
    """Checks the header and the end of an encoded image.

    Args:
        data: the encoded bytes.
        full: also decode all pixels.

    Returns:
        width and height after EXIF orientation, and whether every decoder gives the pixels of
        `decode_rgb` (`plain`: no alpha, no CMYK, at most 8 bits a channel).

    Raises ValueError with the reason when the bytes are not a whole image.
    """
    if not data:
        raise ValueError("image is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        orientation = _orientation(image)
        transparent = image.has_transparency_data
    except Exception as error:
        raise ValueError(f"not an image: starts with {data[:8]!r}") from error
    if not _complete(data, image.format):
        raise ValueError(f"truncated {image.format}: its end marker is missing")
    width, height = image.size
    if orientation in _TRANSPOSED:
        width, height = height, width
    if full or _turned_late(image, data):
        try:
            width, height = decode_rgb(data).size
        except ValueError as error:
            raise ValueError(f"does not decode: {error}") from error
    plain = not transparent and (
        (image.format == "JPEG" and image.mode in ("RGB", "L"))
        or (image.format in ("PNG", "WEBP", "BMP") and image.mode in ("RGB", "L", "P", "1"))
    )
    return width, height, plain


def crop_resize(
    image: Image.Image, box: np.ndarray, size: int | tuple[int, int], filter: str
) -> np.ndarray:
    """Pixels of `box` (x, y, width, height) as (rows, columns, 3) uint8, `size` of them (a square's
    side, or both), by an antialiasing filter.

    The image is cropped first: resizing with a box would read pixels outside it. Columns are
    resized before rows.
    """
    x, y, width, height = (int(v) for v in box)
    if (x, y, width, height) != (0, 0, *image.size):
        image = image.crop((x, y, x + width, y + height))
    # In two calls: Pillow rounds between the directions, and newer versions choose which is first.
    rows, columns = (size, size) if isinstance(size, int) else size
    image = image.resize((columns, image.height), FILTERS[filter])
    return np.asarray(image.resize((columns, rows), FILTERS[filter]))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where there is none."""
    if "exif" not in image.info and image.format != "TIFF":
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    # An EXIF that cannot be read says nothing of how the pixels lie.
    except Exception:
        return 1
    return int(value) if value in range(1, 9) else 1


def _turned_late(image: Image.Image, data: bytes) -> bool:
    """Whether the size after orientation is known only after decoding: an unread PNG's EXIF may lie
    behind its pixels, and Pillow turns a TIFF by itself, its size before its pixels.
    """
    if image.format == "TIFF":
        return _orientation(image) != 1
    return image.format == "PNG" and b"eXIf" in data


def _complete(data: bytes, format: str | None) -> bool:
    """Whether a JPEG, PNG or WebP has its end marker; True for other formats."""
    if format in ("JPEG", "MPO"):
        return data.find(b"\xff\xd9", _scan_start(data)) >= 0
    if format == "PNG":
        return data.rfind(b"IEND") >= 0
    if format == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 <= len(data)
    return True


def _scan_start(data: bytes) -> int:
    """Offset of a JPEG's first scan; an EXIF thumbnail before it has an end marker of its own."""
    offset = 2
    while offset + 4 <= len(data) and data[offset] == 0xFF and data[offset + 1] != 0xDA:
        if data[offset + 1] == 0xFF:
            offset += 1
            continue
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return offset
