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
