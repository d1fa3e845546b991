"""FLIP: CLIP's step with half or three quarters of the patches dropped, against open_clip's on
whole images. `open_clip_dropped` has open_clip's own PatchDropout, which drops what it has
embedded.
"""

from __future__ import annotations

import torch

from benchmarks.harness import Run
from benchmarks.shapes import SHAPES as _SHAPES
from benchmarks.step import clip_steps
from benchmarks.step.clip_steps import bytes, flops, setup

__all__ = ["bytes", "flops", "setup"]

OP = "step_flip"
SHAPES = _SHAPES[OP]
DTYPES = ("fp32", "bf16")
DIRECTIONS = ("step",)
BASELINE = "open_clip"
TESTS = ("tests/objectives/test_step.py", "tests/benchmarks/test_step.py")


def impls(device: torch.device) -> dict[str, Run]:
    """Ours, and open_clip's on whole images and on kept patches."""
    return {
        "vlpfast": clip_steps.own(),
        "open_clip": clip_steps.open_clip(),
        "open_clip_dropped": clip_steps.open_clip(dropped=True),
    }
