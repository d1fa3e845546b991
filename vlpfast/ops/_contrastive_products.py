"""What the chunked contrastive losses do outside their passes: memory, and products of features."""

from __future__ import annotations

import torch
from torch import Tensor

from vlpfast import _ext

# Below this the system call costs more than the page faults it saves.
_HUGE_BYTES = 4 << 20

torch.library.define("vlpfast::huge_pages", "(Tensor(a!) memory) -> ()")
torch.library.register_fake("vlpfast::huge_pages", lambda memory: None)
_huge_pages = torch.ops.vlpfast.huge_pages.default


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory; on a CPU with few page faults to come (csrc/cpu/huge_pages.cpp)."""
    memory = like.new_empty(shape, dtype=dtype)
    if memory.device.type == "cpu" and memory.nbytes >= _HUGE_BYTES and _ext.cpp_missing() is None:
        _huge_pages(memory)
    return memory


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """fp32 zeros in memory from `empty`."""
    return empty(shape, like, torch.float32).zero_()


def add_product(total: Tensor, a: Tensor, b: Tensor, times: int = 1) -> None:
    """total += times * (a @ b), `total` in fp32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b, alpha=times)
    elif a.device.type == "cuda":
        total.copy_(torch.addmm(total, a, b, out_dtype=torch.float32, alpha=times))
    else:
        total.add_(torch.mm(a, b), alpha=times)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """<a_i, b_i> of each row."""
    return (a.float() * b.float()).sum(1)


def row_sums(rows: Tensor, others: Tensor) -> Tensor:
    """sum_j <rows_i, others_j> of each row, without the products."""
    return rows.float() @ others.sum(0, dtype=torch.float32)
