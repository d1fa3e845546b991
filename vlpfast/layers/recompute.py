"""Activations made again in the backward: of a block only what it reads stays in memory.

Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def run(module: nn.Module, *args: object, **options: object) -> object:
    """`module(*args, **options)`; one that has `recomputes` set keeps no activations for the
    backward, and runs there again. What it drops is a function of its seed, so it drops the same.
    """
    if getattr(module, "recomputes", False) and module.training and torch.is_grad_enabled():
        return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False, **options)
    return module(*args, **options)
