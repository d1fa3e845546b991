"""Shapes of the sizes `tiny` and `small`, which train on a CPU, common to all presets."""

from __future__ import annotations

# Width, heads, (vision, text, fusion) depth, patch and image side, width of the joint space.
COMPACT = {
    "tiny": {
        "dim": 192,
        "heads": 6,
        "depths": (4, 2, 2),
        "patch_size": 8,
        "image_size": 64,
        "embed_dim": 128,
    },
    "small": {
        "dim": 384,
        "heads": 6,
        "depths": (8, 4, 4),
        "patch_size": 16,
        "image_size": 128,
        "embed_dim": 256,
    },
}


def compact(size: str) -> tuple[dict, int, int, tuple[int, int, int]]:
    """Width and heads, image side, patch side, depths of vision, text and fusion."""
    part = COMPACT[size]
    return (
        {"dim": part["dim"], "heads": part["heads"]},
        part["image_size"],
        part["patch_size"],
        part["depths"],
    )
