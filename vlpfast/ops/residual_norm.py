"""Dropout, residual sum and norm of a block. Oracle: `reference/residual_norm.py`."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from vlpfast.ops._dispatch import reference_only
from vlpfast.ops.reference import residual_norm as reference


class ResidualNorm(NamedTuple):
    """What `residual_norm` returns.

    Attributes:
        normed (..., D): norm(residual), dtype of `x`; what the next sub-layer reads.
        residual (..., D): the sum before the norm; what the next `residual_norm` adds to.
    """

    normed: Tensor
    residual: Tensor


def residual_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: Literal["layer", "rms"] = "layer",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> ResidualNorm:
    """Drops, adds and normalises: s = residual + dropout(x), normed = norm(s).

        layer: normed = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias     (biased variance)
        rms:   normed = s / sqrt(mean(s ** 2) + eps) * weight + bias

    Statistics are over the last dimension and computed in fp32 at least.

    Args:
        x (..., D): output of the sub-layer, floating point.
        residual (..., D): what it is added to, of its own dtype (fp32 beside bf16 `x` is usual);
            None: s = dropout(x).
        weight (D,): scale; None for 1.
        bias (D,): shift; None for 0.
        kind: "layer" or "rms".
        dropout_p: probability of dropping an element of `x`, in [0, 1); the others grow by
            1 / (1 - p).
        seed: int or 0-d int64 tensor, required with dropout. The mask is a function of (seed, row,
            column), rows counted over all leading dimensions: bits = draw(stream(seed, row),
            column). Two calls in a step need two seeds.
        eps: added to the variance.
        impl: "auto" or "reference".

    Returns:
        ResidualNorm(normed, residual = s).

    Source: Ba et al. 2016, arXiv:1607.06450; Zhang & Sennrich 2019 (RMSNorm), arXiv:1910.07467.
    """
    if kind not in ("layer", "rms"):
        raise ValueError(f"residual_norm: kind must be 'layer' or 'rms', got {kind!r}")
    if residual is not None and residual.shape != x.shape:
        expected, got = tuple(x.shape), tuple(residual.shape)
        raise ValueError(f"residual_norm: residual must be {expected} as x is, got {got}")
    check_rows("residual_norm", x, dropout_p, seed, weight=weight, bias=bias)
    run = _OP.choose(impl, x.device)
    return ResidualNorm(
        *run(x, residual, weight, bias, kind=kind, dropout_p=dropout_p, seed=seed, eps=eps)
    )


def check_rows(
    op: str, x: Tensor, dropout_p: float, seed: int | Tensor | None, **vectors: Tensor | None
) -> None:
    """Checks that the block ops share: `x` (..., D), each vector (D,), dropout with its seed."""
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be floating point, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError(f"{op}: x must be (..., D), got {tuple(x.shape)}")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(f"{op}: {name} must be ({x.shape[-1]},), got {tuple(vector.shape)}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0 and seed is None:
        raise ValueError(f"{op}: dropout_p={dropout_p} needs a seed")


_OP = reference_only("residual_norm", reference.residual_norm)
