"""Image pairs with a statement that is true or false of the two together, as in NLVR."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vlpfast.data.scenes.space import (
    COLORS,
    PAIR,
    SHAPES,
    Scene,
    Split,
    draws,
    pick,
    sample_scene,
)

# Kind -> sentence; the blanks take colors or shapes.
TEMPLATES = {
    "both": "both images contain {}",
    "one": "exactly one image contains {}",
    "each": "the left image contains {} and the right image contains {}",
    "more": "the left image contains more shapes than the right image",
    "same": "the two images contain the same number of shapes",
}
MAX_TRIES = 2000


class Statement(NamedTuple):
    """What a sentence about two images says: its kind, and the colors or shapes it names."""

    kind: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        some = [f"something {word}" if word in COLORS else f"a {word}" for word in self.words]
        return TEMPLATES[self.kind].format(*some)

    def holds(self, left: Scene, right: Scene) -> bool:
        """Whether the sentence is true of the two images."""
        if self.kind == "more":
            return len(left.objects) > len(right.objects)
        if self.kind == "same":
            return len(left.objects) == len(right.objects)
        in_left = _shows(left, self.words[0])
        in_right = _shows(right, self.words[-1])
        return in_left != in_right if self.kind == "one" else in_left and in_right


def _shows(scene: Scene, word: str) -> bool:
    return any(word in (o.color, o.shape) for o in scene.objects)


def image_pair(
    seed: int,
    split: Split,
    number: int,
    num_samples: int,
    *,
    sample: Callable[[int, Split, int], Scene] = sample_scene,
) -> dict[str, object]:
    """Pair `number` of a split: two of its first `num_samples` images, a statement and its truth.

    Odd pairs are true, even ones false. The kind is drawn before the images are searched, and every
    word is as likely in true statements as in false ones: a sentence alone tells nothing. `sample`
    gives the images of the set.

    Returns: left, right (names of images in the shards), statement, label (bool).
    """
    draw = draws(seed, split, number, PAIR)
    label = number % 2 == 1
    kind = pick(draw, tuple(TEMPLATES))
    for _ in range(MAX_TRIES):
        left, right = (sample(seed, split, int(draw() * num_samples)) for _ in range(2))
        # The first word is from one of the images: most random words are in neither.
        named = pick(draw, left.objects)
        words = pick(draw, (named.color, named.shape)), pick(draw, COLORS + SHAPES)
        statement = Statement(kind, words[: TEMPLATES[kind].count("{}")])
        if draw() < 0.5:
            left, right = right, left
        if left.number != right.number and statement.holds(left, right) == label:
            return {
                "left": f"{left.number:09d}",
                "right": f"{right.number:09d}",
                "statement": str(statement),
                "label": label,
            }
    raise ValueError(f"num_samples: {num_samples} images are too few to draw pairs from")
