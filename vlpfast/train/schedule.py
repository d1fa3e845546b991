"""Learning rate as a function of the step alone: resuming needs nothing but the step number."""

from __future__ import annotations

import math

from vlpfast.train.config import OptimConfig


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Warm-up: lr * (step + 1) / warmup. After it, with t running from 0 to 1 over what is left,
    cosine: min_lr + (lr - min_lr) * (1 + cos(pi t)) / 2;  const: lr;
    const-cooldown: lr, and over the last `cooldown` steps min_lr + (lr - min_lr) * (1 - t)^power.

    Source: open_clip, `training/scheduler.py`; `min_lr` is ALBEF's floor of the cosine.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    span = config.lr - config.min_lr
    if config.lr_scheduler == "cosine":
        t = (step - config.warmup) / max(total_steps - config.warmup, 1)
        return config.min_lr + 0.5 * span * (1 + math.cos(math.pi * min(t, 1.0)))
    start = total_steps - config.cooldown
    if config.lr_scheduler == "const" or step < start or config.cooldown == 0:
        return config.lr
    t = (step - start) / config.cooldown
    return config.min_lr + span * (1 - min(t, 1.0)) ** config.cooldown_power
