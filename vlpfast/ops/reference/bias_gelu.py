"""Bias, GELU and dropout: plain torch, nothing fused."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu

from vlpfast.ops.reference.residual_norm import dropout


def bias_gelu(
    x: Tensor, bias: Tensor | None, *, kind: str, dropout_p: float, seed: int | Tensor | None
) -> Tensor:
    """`vlpfast.ops.bias_gelu`, same arguments."""
    y = x if bias is None else x + bias
    y = gelu(y) if kind == "gelu" else y * (1.702 * y).sigmoid()
    return dropout(y.to(x.dtype), dropout_p, seed)
