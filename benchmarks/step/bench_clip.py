"""CLIP's training step against open_clip's: same weights, same images, the same captions packed and
padded to 77 tokens, the same loss.
"""

from __future__ import annotations

import torch

from benchmarks.harness import Run
from benchmarks.shapes import SHAPES as _SHAPES
from benchmarks.step import clip_steps
from benchmarks.step.clip_steps import bytes, flops, setup

__all__ = ["bytes", "flops", "setup"]

OP = "step_clip"
SHAPES = _SHAPES[OP]
DTYPES = ("fp32", "bf16")
DIRECTIONS = ("step",)
BASELINE = "open_clip"
TESTS = ("tests/objectives/test_step.py", "tests/benchmarks/test_step.py")


def impls(device: torch.device) -> dict[str, Run]:
    """Ours and open_clip's."""
    return {"vlpfast": clip_steps.own(), "open_clip": clip_steps.open_clip()}
