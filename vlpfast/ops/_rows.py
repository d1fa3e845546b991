"""What the fused elementwise ops of a block share: seeds as tensors, vectors in fp32, and why a
fused implementation cannot run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlpfast import _ext

# Widest row that one Triton program holds (kernels/_rows.py).
_TRITON_MAX_COLUMNS = 16384


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """0-d int64 on `device`; 0 where there is no seed, for ops that then draw nothing."""
    if isinstance(seed, Tensor):
        return seed.to(device, torch.int64, non_blocking=True)
    # A fill, so that nothing is copied from the host.
    return torch.full((), seed or 0, dtype=torch.int64, device=device)


def wide(vector: Tensor | None) -> Tensor | None:
    """The vector in fp32 and contiguous, as kernels read it."""
    return None if vector is None else vector.float().contiguous()


def fused_rejects(backend: str) -> Callable[..., str | None]:
    """Why `backend` ("cpp" or "triton") cannot take tensors of `dtypes` with `columns` on `device`,
    as a function for `Implementation.rejects`.
    """
    on_device = _ext.cpp_rejects if backend == "cpp" else _ext.triton_rejects

    def rejects(
        *, device: torch.device, dtypes: Sequence[torch.dtype], columns: int, **_: object
    ) -> str | None:
        other = [d for d in dtypes if d not in (torch.float32, torch.bfloat16)]
        if other:
            return f"takes fp32 and bf16, got {other[0]}"
        if backend == "triton" and columns > _TRITON_MAX_COLUMNS:
            return f"takes up to {_TRITON_MAX_COLUMNS} columns, got {columns}"
        return on_device(device)

    return rejects
