"""Noisy pairs, as the web has them: samples whose captions are another image's."""

from __future__ import annotations

from collections.abc import Callable

from vlpfast.data.scenes.space import PAIR, Scene, Split, draws, sample_scene
from vlpfast.data.scenes.text import describe, misses
from vlpfast.ops.seed import fold_seed

MAX_TRIES = 1000
# What makes the draws of this module a stream of their own.
_SALT = 0x401


def noisy_captions(
    scene: Scene,
    share: float,
    num_samples: int,
    *,
    sample: Callable[[int, Split, int], Scene] = sample_scene,
) -> list[str] | None:
    """Captions of another of the first `num_samples` images, none of which is true of `scene`; in
    all but a random `share` of scenes, None.

    A function of seed, split and number: whether a scene is noisy depends on nothing else, and
    whose captions it has, only on `num_samples` besides. One image's may be given to several.

    Raises:
        ValueError: there is no such other image among those drawn.
    """
    draw = draws(fold_seed(scene.seed, _SALT), scene.split, scene.number, PAIR)
    if draw() >= share:
        return None
    for _ in range(MAX_TRIES):
        other = sample(scene.seed, scene.split, int(draw() * num_samples))
        if misses(other, scene):
            return describe(other)
    raise ValueError(
        f"num_samples: {num_samples} images are too few to find captions that are false of "
        f"{scene.split} sample {scene.number}"
    )
