"""Products of features that the chunked contrastive losses make outside their passes, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


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
