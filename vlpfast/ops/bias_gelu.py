"""Bias, GELU and dropout between the two matrices of an MLP. Oracle: `reference/bias_gelu.py`."""

from __future__ import annotations

from torch import Tensor

from vlpfast.ops._dispatch import reference_only
from vlpfast.ops.reference import bias_gelu as reference
from vlpfast.ops.residual_norm import check_rows


def bias_gelu(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """dropout(gelu(x + bias)) with the exact gelu(y) = y * (1 + erf(y / sqrt(2))) / 2.

    Args:
        x (..., D): output of the first linear layer without its bias, floating point.
        bias (D,): that layer's bias; None for 0.
        dropout_p: probability of dropping an output, in [0, 1); the others grow by 1 / (1 - p).
        seed: int or 0-d int64 tensor, required with dropout. The mask is a function of (seed, row,
            column) as in `residual_norm`.
        impl: "auto" or "reference".

    Returns:
        Shape and dtype of `x`.

    Source: Hendrycks & Gimpel 2016, eq. 1, arXiv:1606.08415.
    """
    check_rows("bias_gelu", x, dropout_p, seed, bias=bias)
    return _OP.choose(impl, x.device)(x, bias, dropout_p=dropout_p, seed=seed)


_OP = reference_only("bias_gelu", reference.bias_gelu)
