"""Checks of arguments that the public ops share; a wrong one is named with what was expected."""

from __future__ import annotations

import torch
from torch import Tensor


def check_devices(device: torch.device, *, prefix: str = "", **tensors: Tensor | None) -> None:
    """Every tensor on `device`: kernels read memory by address, and would not notice."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{prefix}{name} must be on {device} as the others, got {tensor.device}"
            )


def check_integers(*, prefix: str = "", **values: int | None) -> None:
    """None of them a float, which a kernel would round or refuse in its own words."""
    for name, value in values.items():
        if isinstance(value, float | str):
            raise TypeError(f"{prefix}{name} must be an int, got {value!r}")


def check_seed(seed: int | Tensor | None, *, prefix: str = "") -> None:
    """An int or an integer tensor."""
    if isinstance(seed, Tensor):
        if seed.is_floating_point():
            raise TypeError(f"{prefix}seed must be an int or an int64 tensor, got {seed.dtype}")
    else:
        check_integers(prefix=prefix, seed=seed)
