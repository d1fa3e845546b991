"""Pixels and detector-like regions of a scene.

Drawing is a blend of cached patches, each anti-aliased once.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np

from vlpfast.data.scenes.space import (
    COLORS,
    COMBINATIONS,
    GRID,
    REGIONS,
    SHAPES,
    SIZES,
    SPLITS,
    TEXTURES,
    Scene,
)

RGB = {
    "red": (214, 32, 32),
    "green": (36, 150, 56),
    "blue": (36, 72, 214),
    "yellow": (236, 196, 16),
    "purple": (120, 36, 160),
    "pink": (248, 112, 180),
    "cyan": (24, 184, 204),
    "black": (24, 24, 24),
}
SHADES = (0.88, 0.94, 1.0)
SUPERSAMPLE = 8
# In units of 1/32 image side. Chosen so that at 64 pixels the two most alike of all shapes and
# textures differ most (tests/data/test_scenes.py).
STRIPE_PERIOD, STRIPE_WIDTH = 2.5, 1.2
DOT_PERIOD, DOT_RADIUS = 2.0, 0.75
RIM = 0.4  # keeps the plain color
FEATURE_DIM = 64
NUM_CLASSES = len(COMBINATIONS) + 1  # the last one is background


def _pool(fine: np.ndarray) -> np.ndarray:
    """(D, D) means over `SUPERSAMPLE` x `SUPERSAMPLE` blocks."""
    n = len(fine) // SUPERSAMPLE
    return fine.reshape(n, SUPERSAMPLE, n, SUPERSAMPLE).mean(axis=(1, 3))


@cache
def _inside(shape: str, diameter: int) -> np.ndarray:
    """(S*D, S*D) bool: a shape that fills its box of `diameter` pixels, S subpixels each."""
    n = diameter * SUPERSAMPLE
    axis = (np.arange(n) + 0.5) / n * 2 - 1
    u, v = np.meshgrid(axis, axis)
    if shape == "circle":
        inside = u * u + v * v <= 1
    elif shape == "square":
        inside = np.ones_like(u, dtype=bool)
    elif shape == "triangle":
        inside = np.abs(u) <= (v + 1) / 2
    elif shape == "cross":
        inside = np.minimum(np.abs(u), np.abs(v)) <= 0.4
    elif shape == "diamond":
        inside = np.abs(u) + np.abs(v) <= 1
    elif shape == "ring":
        inside = (u * u + v * v <= 1) & (u * u + v * v >= 0.25)
    elif shape == "heart":
        # (x^2 + y^2 - 1)^3 <= x^2 y^3 spans |x| <= 1.139 and -1 <= y <= 1.2363.
        x, y = u * 1.139, 0.1181 - v * 1.1181
        inside = (x * x + y * y - 1) ** 3 <= x * x * y**3
    elif shape == "star":
        # Five tips at radius 1 span |x| <= sin 72 deg and -cos 36 deg <= y <= 1.
        low = math.cos(math.pi / 5)
        x, y = u * math.sin(math.tau / 5), (1 - low) / 2 - v * (1 + low) / 2
        angle = np.abs((np.arctan2(x, y) + math.pi / 5) % (math.tau / 5) - math.pi / 5)
        inner = 0.52
        # Inside the line from the tip (1, 0) to the inner corner at 36 degrees.
        tip_x, tip_y = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
        corner_x, corner_y = inner * math.cos(math.pi / 5), inner * math.sin(math.pi / 5)
        inside = (1 - tip_x) * corner_y >= tip_y * (1 - corner_x)
    else:
        raise ValueError(f"shape: expected one of {SHAPES}, got {shape!r}")
    return inside


@cache
def _whiteness(shape: str, texture: str, diameter: int, unit: float) -> np.ndarray:
    """(D, D) share of white that a texture mixes into the color; `unit` = pixels per grid unit.

    A rim keeps the plain color, so that the outline stands out from a light background.
    """
    if texture == "plain":
        return np.zeros((diameter, diameter))
    n = diameter * SUPERSAMPLE
    rim = round(RIM * unit * SUPERSAMPLE)
    padded = np.pad(_inside(shape, diameter), rim)
    shifts = ((0, rim), (2 * rim, rim), (rim, 0), (rim, 2 * rim))
    core = np.logical_and.reduce([padded[i : i + n, j : j + n] for i, j in shifts])
    axis = ((np.arange(n) + 0.5) / SUPERSAMPLE - diameter / 2) / unit
    if texture == "striped":
        # A white stripe lies on the centre, dots lie around it.
        y = (axis + STRIPE_PERIOD / 2) % STRIPE_PERIOD - STRIPE_PERIOD / 2
        white = (np.abs(y) < STRIPE_WIDTH / 2)[:, None]
    else:
        square = (axis % DOT_PERIOD - DOT_PERIOD / 2) ** 2
        white = square[:, None] + square[None, :] < DOT_RADIUS**2
    return _pool(white & core)


@cache
def _patch(
    shape: str, color: str, texture: str, shade: int, diameter: int, unit: float
) -> tuple[np.ndarray, np.ndarray]:
    """uint16 (256 - alpha, color * alpha), alpha in 0..256; (below * first + second) >> 8 draws."""
    alpha = np.round(_pool(_inside(shape, diameter)) * 256)[..., None]
    white = _whiteness(shape, texture, diameter, unit)[..., None]
    rgb = np.array(RGB[color]) * SHADES[shade] * (1 - white) + 255 * white
    return (256 - alpha).astype(np.uint16), (np.floor(rgb) * alpha).astype(np.uint16)


@cache
def _ramp(direction: int, strength: int, size: int) -> np.ndarray:
    """(S, S, 1) int16 brightness offsets within +- strength."""
    angle = direction * math.tau / 16
    axis = np.linspace(-1, 1, size)
    plane = (axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle)) / math.sqrt(2)
    return np.round(plane * strength).astype(np.int16)[..., None]


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """Draws the scene.

    Returns: (size, size, 3) uint8 RGB. Where `size` is a multiple of 32 the objects fill their
        boxes to the pixel; elsewhere box edges are rounded to whole pixels.
    """
    if size < GRID:
        raise ValueError(f"size: expected at least {GRID} pixels, got {size}")
    background = scene.background
    ramp = _ramp(background.direction, background.strength, size)
    image = (ramp + np.array(background.rgb, dtype=np.int16)).astype(np.uint8)
    unit = size / GRID
    for o in scene.objects:
        diameter = round(o.diameter * unit)
        x, y = (min(round(edge * unit), size - diameter) for edge in (o.x, o.y))
        keep, paint = _patch(o.shape, o.color, o.texture, o.shade, diameter, unit)
        window = image[y : y + diameter, x : x + diameter]
        window[...] = (window * keep + paint) >> 8
    return image


class Regions(NamedTuple):
    """What an object detector would have said.

    Attributes:
        features (R, D): float32 region vectors.
        boxes (R, 4): float32 normalised (x1, y1, x2, y2).
        soft_labels (R, C): float32 class distribution: (shape, color) `COMBINATIONS`, background.
        sources (R,): int64 object of each region, -1 for background: the truth, not an input.
        soft_attributes (R, A): float32 distribution of (size, texture), size by size, background.
    """

    features: np.ndarray
    boxes: np.ndarray
    soft_labels: np.ndarray
    sources: np.ndarray
    soft_attributes: np.ndarray


@cache
def _embedding(dim: int) -> np.ndarray:
    """Fixed projection from one-hots (shape, color, size, texture, background), rows near unit."""
    rows = len(SHAPES) + len(COLORS) + len(SIZES) + len(TEXTURES) + 1
    return np.random.RandomState(0).standard_normal((rows, dim)) / math.sqrt(dim)


def regions(
    scene: Scene, *, num_regions: int = 8, dim: int = FEATURE_DIM, noise: float = 0.5
) -> Regions:
    """Noisy regions of a scene, a function of its truth and its (seed, split, number).

    features = one_hots @ fixed projection + noise / sqrt(dim) * normal
    soft_labels = softmax(4 * one_hot(class) + noise * normal); soft_attributes alike
    Every object has one region with a jittered box; the others are background at random places.
    The order is random.

    Args:
        scene: the scene; at most `num_regions` objects.
        num_regions: R.
        dim: D.
        noise: size of the noise on features, logits and (times 1/32) box edges; 0 = exact truth.
    Returns: Regions.
    """
    if num_regions < len(scene.objects):
        raise ValueError(f"num_regions: expected >= {len(scene.objects)}, got {num_regions}")
    rng = np.random.RandomState(
        [
            *(scene.seed & 0xFFFFFFFF, scene.seed >> 32 & 0xFFFFFFFF),
            *(scene.number & 0xFFFFFFFF, scene.number >> 32),
            *(SPLITS.index(scene.split), REGIONS),
        ]
    )
    sources = np.full(num_regions, -1, dtype=np.int64)
    sources[rng.permutation(num_regions)[: len(scene.objects)]] = np.arange(len(scene.objects))
    corner = rng.uniform(0, 0.7, (num_regions, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.15, 0.3, (num_regions, 2))], axis=1)
    table = _embedding(dim)
    hot = np.zeros((num_regions, len(table)))
    logits = np.zeros((num_regions, NUM_CLASSES))
    attributes = np.zeros((num_regions, len(SIZES) * len(TEXTURES) + 1))
    for r, source in enumerate(sources):
        if source < 0:
            hot[r, -1] = 1
            logits[r, -1] = attributes[r, -1] = 4
            continue
        o = scene.objects[source]
        shape, color = SHAPES.index(o.shape), COLORS.index(o.color)
        size, texture = SIZES.index(o.size), TEXTURES.index(o.texture)
        hot[r, [shape, 8 + color, 16 + size, 18 + texture]] = 1
        logits[r, shape * 8 + color] = 4
        attributes[r, size * len(TEXTURES) + texture] = 4
        boxes[r] = o.box
    boxes += (sources >= 0)[:, None] * rng.standard_normal((num_regions, 4)) * noise / GRID
    features = hot @ table + rng.standard_normal((num_regions, dim)) * noise / math.sqrt(dim)
    soft = []
    for each in (logits, attributes):
        each += rng.standard_normal(each.shape) * noise
        weights = np.exp(each - each.max(axis=1, keepdims=True))
        soft.append((weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))
    as_float = [a.astype(np.float32) for a in (features, boxes.clip(0, 1))]
    return Regions(*as_float, soft[0], sources, soft[1])
