"""Residual sum and norm, and the dropout that the block ops share: plain torch, nothing fused."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from vlpfast.ops.reference.counter import draw, keep_mask, stream


def dropout(x: Tensor, dropout_p: float, seed: int | Tensor | None) -> Tensor:
    """x * keep / (1 - p); x is (rows, columns), keep of bits draw(stream(seed, row), column)."""
    if dropout_p == 0:
        return x
    columns = x.shape[-1]
    row = torch.arange(x.numel() // max(columns, 1), device=x.device)
    bits = draw(stream(seed, row)[:, None], torch.arange(columns, device=x.device))
    keep = keep_mask(bits, dropout_p).view(x.shape)
    return x * (keep.to(x.dtype) / (1 - dropout_p))


def residual_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    kind: str,
    dropout_p: float,
    seed: int | Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`vlpfast.ops.residual_norm`, same arguments."""
    total = dropout(x, dropout_p, seed)
    total = total if residual is None else residual + total
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    weight, bias = (None if p is None else p.to(wide.dtype) for p in (weight, bias))
    if kind == "layer":
        normed = layer_norm(wide, wide.shape[-1:], weight, bias, eps)
    else:
        normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        normed = normed if weight is None else normed * weight
        normed = normed if bias is None else normed + bias
    return normed.to(x.dtype), total
