"""Recipes cut down to seconds, and whether two runs ended in the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from vlpfast import recipes
from vlpfast.train.config import RunConfig
from vlpfast.train.types import TrainResult


def small(name: str, data: Path, logs: Path, steps: int = 6, **settings: object) -> RunConfig:
    """Recipe `name` with 8 pairs a step, 32 wide, at most one block a stack; `settings` of
    `train`.
    """
    config = recipes.get(name)
    stacks = {}
    for part in ("vision", "text", "fusion"):
        stack = getattr(config.model, part)
        stacks[part] = replace(stack, dim=32, heads=2, depth=min(stack.depth, 1))
    settings = {
        "batch_size": 8,
        "steps": steps,
        "save_every": 4,
        "log_every_n_steps": 1,
        "precision": "fp32",
        "report_to": "none",
        "logs": str(logs),
        **settings,
    }
    return replace(
        config,
        model=replace(config.model, **stacks),
        data=replace(config.data, path=str(data), workers=1),
        train=replace(config.train, **settings),
    )


def assert_same_weights(one: TrainResult, two: TrainResult) -> None:
    """To the bit."""
    states = [torch.load(r.checkpoint, weights_only=True)["state_dict"] for r in (one, two)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=0, atol=0, msg=key)
