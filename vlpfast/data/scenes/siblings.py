"""Siblings: two scenes that differ only in what belongs to what, captions of the same words.

"A red circle left of a blue square" is true of one and "a blue circle left of a red square" of the
other: hard negatives of each other, as in Winoground (Thrush et al. 2022, arXiv:2204.03162).
"""

from __future__ import annotations

from dataclasses import replace

from vlpfast.data.scenes.space import (
    CELL,
    CELL_STEP,
    HELD_OUT,
    SCENE,
    Object,
    Scene,
    Split,
    allowed,
    draws,
    sample_scene,
    shuffled,
)
from vlpfast.data.scenes.text import relate


def sample_siblings(
    seed: int, split: Split, number: int, share: float = 1.0
) -> tuple[Scene, Scene]:
    """Samples `number` and `number + 1` of a set with siblings.

    The first is `sample_scene`'s, the second the same with places, sizes, textures, colors or
    shapes of two objects exchanged. The relational caption of each has the words of the other's and
    is false of the other. Where no exchange does that within the split (as with a single object),
    and in all but a random `share` of pairs, the second is `sample_scene`'s too.

    Args:
        seed, split: as in `sample_scene`.
        number: even.
        share: of pairs that are siblings, in [0, 1].
    """
    if number % 2:
        raise ValueError(f"number: expected an even one, got {number}")
    scene = sample_scene(seed, split, number)
    draw = draws(seed, split, number + 1, SCENE)
    found = relate(scene, draw) if share == 1 or draw() < share else None
    for field in shuffled(draw, list(found.false)) if found else ():
        swapped = found.false[field]
        objects = exchange(scene.objects, found.a, found.b, field)
        sibling = replace(scene, number=number + 1, objects=objects, claims=(swapped, found.claim))
        if _belongs(sibling) and not found.claim.holds(sibling):
            return replace(scene, claims=(found.claim, swapped)), sibling
    return scene, sample_scene(seed, split, number + 1)


def sample_sibling(seed: int, split: Split, number: int, share: float = 1.0) -> Scene:
    """Sample `number` of a set with siblings."""
    return sample_siblings(seed, split, number - number % 2, share)[number % 2]


def exchange(objects: tuple[Object, ...], a: Object, b: Object, field: str) -> tuple[Object, ...]:
    """The objects with `field` of `a` and `b` exchanged: "place", "size", "texture", "color" or
    "shape". All else stays, also where in its cell an object lies, as far as it fits.
    """
    new = {a: _take(a, b, field), b: _take(b, a, field)}
    return tuple(sorted((new.get(o, o) for o in objects), key=lambda o: o.cell))


def _take(o: Object, other: Object, field: str) -> Object:
    """`o` with `field` of `other`."""
    if field == "place":
        x = o.x + CELL_STEP * (other.cell % 3 - o.cell % 3)
        y = o.y + CELL_STEP * (other.cell // 3 - o.cell // 3)
        return o._replace(cell=other.cell, x=x, y=y)
    if field == "size":
        room = CELL - other.diameter
        return o._replace(
            size=other.size,
            diameter=other.diameter,
            x=min(o.x, CELL_STEP * (o.cell % 3) + room),
            y=min(o.y, CELL_STEP * (o.cell // 3) + room),
        )
    return o._replace(**{field: getattr(other, field)})


def _belongs(scene: Scene) -> bool:
    """Whether its split may show the scene."""
    shown = {(o.shape, o.color) for o in scene.objects}
    return shown <= set(allowed(scene.split)) and (
        scene.split != "heldout" or not shown.isdisjoint(HELD_OUT)
    )
