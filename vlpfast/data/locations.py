"""Boxes as location tokens: four numbers of bins, y1 x1 y2 x2, each spelled `<loc17>`.

Boxes are (x1, y1, x2, y2), fractions of an image's width and height.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
# An object of which a crop shows less is not asked for.
_LEAST_SHOWN = 0.5


def box_bins(box: Sequence[float], num_bins: int) -> list[int]:
    """y1, x1, y2, x2 as numbers of bins: floor((num_bins - 1) * fraction).

    Source: allenai/unified-io-inference uio/utils.py, `region_to_tokens`.
    """
    x1, y1, x2, y2 = (min(max(float(v), 0.0), 1.0) for v in box)
    return [int((num_bins - 1) * v) for v in (y1, x1, y2, x2)]


def bins_box(bins: Sequence[int], num_bins: int) -> Box:
    """The box of four bins: the middles of what `box_bins` puts there, so that a side is off by at
    most half a bin. The published `tokens_to_regions` takes number / num_bins.
    """
    y1, x1, y2, x2 = (min((b + 0.5) / (num_bins - 1), 1.0) for b in bins)
    return x1, y1, x2, y2


def spell(box: Sequence[float], num_bins: int) -> str:
    """A box as location tokens in a text."""
    return " ".join(f"<loc{b}>" for b in box_bins(box, num_bins))


def shown_part(box: Sequence[float], crop: Box) -> Box | None:
    """A box within a crop (x1, y1, x2, y2) of its image, cut at the crop's borders; None where less
    than half of it is left.
    """
    left, top, right, bottom = crop
    wide, high = right - left, bottom - top
    x1, y1, x2, y2 = box
    moved = ((x1 - left) / wide, (y1 - top) / high, (x2 - left) / wide, (y2 - top) / high)
    cut = tuple(min(max(v, 0.0), 1.0) for v in moved)
    area = lambda b: (b[2] - b[0]) * (b[3] - b[1])
    return cut if area(cut) >= _LEAST_SHOWN * area(moved) else None


def named_objects(record: Mapping[str, object], crop: Box = WHOLE) -> Iterator[tuple[str, Box]]:
    """Name and box, within `crop`, of each object of a record that is the only one of its name.

    Args:
        record: whose `objects` have a `box` and a `name`, or the `color` and `shape` of generated
            scenes.
        crop: the part of the image that is shown.

    Raises:
        ValueError: an object has no box, or no name.
    """
    objects = record["objects"]
    for o in objects:
        if "box" not in o or not ("name" in o or {"color", "shape"} <= o.keys()):
            raise ValueError(
                "data.tasks 'box' and 'region' need objects with a box and a name (or color and "
                f"shape), found one with {sorted(o)}"
            )
    names = [o["name"] if "name" in o else f"{o['color']} {o['shape']}" for o in objects]
    count = Counter(names)
    for name, o in zip(names, objects, strict=True):
        if count[name] == 1 and (box := shown_part(o["box"], crop)) is not None:
            yield name, box
