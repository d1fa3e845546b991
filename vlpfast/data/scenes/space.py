"""What a scene is: attribute space, sampling, identity and truth. No pixels here, and of
sentences only what relational ones claim.

A scene is a pure function of (seed, split, number); nothing depends on what was drawn before it.

Two scenes may have the same description; such samples have one `image_id`. Of the first 1,000 /
10,000 / 100,000 `train` samples (seed 0) 1.0 / 3.2 / 10.1 % share theirs with another, of 1,000
`val` ones 0.4 %, of `heldout` 2.3 %; 11 % of these `val` descriptions are in 100,000 `train` ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

Split = Literal["train", "val", "heldout"]
Draw = Callable[[], float]
T = TypeVar("T")

SPLITS: tuple[Split, ...] = ("train", "val", "heldout")
# No word starts with a vowel: "a" fits all, so exchanging words keeps a caption's bag of words.
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "ring")
COLORS = ("red", "green", "blue", "yellow", "purple", "pink", "cyan", "black")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
PLACES = (
    *("top left", "top", "top right"),
    *("left", "centre", "right"),
    *("bottom left", "bottom", "bottom right"),
)
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

COMBINATIONS = tuple((shape, color) for shape in SHAPES for color in COLORS)
# Each shape and each color is held out once, so neither word alone tells the split.
HELD_OUT = tuple((shape, COLORS[(3 * i + 2) % 8]) for i, shape in enumerate(SHAPES))
SEEN = tuple(pair for pair in COMBINATIONS if pair not in HELD_OUT)

GRID = 32  # a scene's unit of length is 1/32 of the image side: whole pixels at 64, 96, 224, ...
CELL, CELL_STEP = 10, 11  # a place is 10 units wide, at 0, 11 or 22: objects never touch
DIAMETERS = {"small": (5, 6), "large": (9, 10)}
NUM_SHADES = 3
SHARE_RATIO = 0.3  # chance that an object repeats the color or the shape of the one drawn before it
# Few single objects: they have only 3,024 descriptions, so they are the main source of duplicates.
COUNT_LIMITS = (0.1, 0.45, 0.75)  # cumulative chance of at most 1, 2, 3 objects; else 4

# Independent random streams of one sample.
SCENE, TEXT, REGIONS, PAIR = range(4)


class Object(NamedTuple):
    """One drawn object; its top left corner `x`, `y` and `diameter` in units of 1/32 image side."""

    shape: str
    color: str
    size: str
    texture: str
    cell: int
    x: int
    y: int
    diameter: int
    shade: int

    @property
    def place(self) -> str:
        """Words for the 3x3 grid cell."""
        return PLACES[self.cell]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2) as fractions of the image side."""
        x, y, d = self.x, self.y, self.diameter
        return (x / GRID, y / GRID, (x + d) / GRID, (y + d) / GRID)


class Background(NamedTuple):
    """A light color and a linear brightness ramp: `direction` of 16, `strength` its half range."""

    rgb: tuple[int, int, int]
    direction: int
    strength: int


class Phrase(NamedTuple):
    """A noun phrase; an empty size or texture is not stated."""

    size: str
    texture: str
    color: str
    shape: str

    def __str__(self) -> str:
        return " ".join(word for word in self if word)

    def fits(self, o: Object) -> bool:
        """Whether the phrase is true of an object."""
        return (
            self.color == o.color
            and self.shape == o.shape
            and self.size in ("", o.size)
            and self.texture in ("", o.texture)
        )


class Claim(NamedTuple):
    """ "a `first` `relation` a `second`"."""

    first: Phrase
    relation: str
    second: Phrase

    def __str__(self) -> str:
        return f"a {self.first} {self.relation} a {self.second}"

    def holds(self, scene: Scene) -> bool:
        """Whether some two objects of the scene are as claimed."""
        return any(
            self.first.fits(a) and self.second.fits(b) and related(a, self.relation, b)
            for a in scene.objects
            for b in scene.objects
        )


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything there is to know about one image; `objects` in reading order of their cells.

    `claims`, where its relational caption is not to be drawn from the objects: what that says, and
    a false one of the same words.
    """

    seed: int
    split: Split
    number: int
    objects: tuple[Object, ...]
    background: Background
    claims: tuple[Claim, Claim] | None = None

    @property
    def image_id(self) -> int:
        """The description as a number below 2**48: equal exactly when shape, color, size, texture
        and place of all objects are equal. No caption speaks of jitter, shade and background.
        """
        code = 0
        for o in self.objects:
            kind = (SHAPES.index(o.shape) * 8 + COLORS.index(o.color)) * 2 + SIZES.index(o.size)
            code = code * 3457 + (kind * 3 + TEXTURES.index(o.texture)) * 9 + o.cell + 1
        return code


def draws(seed: int, split: Split, number: int, purpose: int) -> Draw:
    """The uniform [0, 1) stream of one sample and purpose.

    Python promises that `random()` gives the same numbers in all its versions.
    """
    if seed < 0 or not 0 <= number < 1 << 48:
        raise ValueError(f"expected seed >= 0 and 0 <= number < 2**48, got {seed=}, {number=}")
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    key = (((seed << 2) | SPLITS.index(split)) << 2) | purpose
    return random.Random((key << 48) | number).random


def pick(draw: Draw, options: Sequence[T]) -> T:
    """One of `options`, all equally likely."""
    return options[int(draw() * len(options))]


def shuffled(draw: Draw, options: Sequence[T]) -> list[T]:
    """`options` in random order."""
    rest = list(options)
    return [rest.pop(int(draw() * len(rest))) for _ in options]


def allowed(split: Split) -> tuple[tuple[str, str], ...]:
    """(shape, color) pairs that images and sentences of a split may speak of."""
    return COMBINATIONS if split == "heldout" else SEEN


def draw_combination(draw: Draw, split: Split, num_objects: int) -> tuple[str, str]:
    """A (shape, color) distributed like that of a random object of a scene with `num_objects`."""
    if split == "heldout" and draw() * num_objects < 1:
        return pick(draw, HELD_OUT)
    return pick(draw, allowed(split))


def sample_scene(seed: int, split: Split, number: int) -> Scene:
    """Scene `number` of a split: 1-4 objects in different cells of the 3x3 grid.

    `train` and `val` are one distribution, without the `HELD_OUT` combinations; a `heldout` scene
    has at least one of them.
    """
    draw = draws(seed, split, number, SCENE)
    amount = draw()
    num_objects = 1 + sum(amount >= limit for limit in COUNT_LIMITS)
    cells = list(range(9))
    options = allowed(split)
    objects: list[Object] = []
    for i in range(num_objects):
        if i == 0 and split == "heldout":
            shape, color = pick(draw, HELD_OUT)
        elif i and draw() < SHARE_RATIO:
            axis = int(draw() * 2)
            shape, color = pick(draw, [pair for pair in options if pair[axis] == objects[-1][axis]])
        else:
            shape, color = pick(draw, options)
        cell = cells.pop(int(draw() * len(cells)))
        size = pick(draw, SIZES)
        diameter = pick(draw, DIAMETERS[size])
        x = CELL_STEP * (cell % 3) + int(draw() * (CELL - diameter + 1))
        y = CELL_STEP * (cell // 3) + int(draw() * (CELL - diameter + 1))
        texture, shade = pick(draw, TEXTURES), int(draw() * NUM_SHADES)
        objects.append(Object(shape, color, size, texture, cell, x, y, diameter, shade))
    level = 185 + 40 * draw()
    rgb = tuple(int(level + 24 * draw() - 12) for _ in range(3))
    background = Background(rgb, int(draw() * 16), int(draw() * 19))
    objects.sort(key=lambda o: o.cell)
    return Scene(seed, split, number, tuple(objects), background)


def related(a: Object, relation: str, b: Object) -> bool:
    """Whether `a` is `relation` `b`, by columns and rows of the grid."""
    if relation == "left of":
        return a.cell % 3 < b.cell % 3
    if relation == "right of":
        return a.cell % 3 > b.cell % 3
    if relation == "above":
        return a.cell // 3 < b.cell // 3
    return a.cell // 3 > b.cell // 3


def relations(a: Object, b: Object) -> list[str]:
    """All relations that hold from `a` to `b`; one or two, as their cells differ."""
    return [name for name in RELATIONS if related(a, name, b)]


def unique(objects: Sequence[Object], key: Callable[[Object], T]) -> list[Object]:
    """Objects that no other one equals in `key`, so that "the ..." points at one object."""
    keys = [key(o) for o in objects]
    return [o for o, value in zip(objects, keys, strict=True) if keys.count(value) == 1]
