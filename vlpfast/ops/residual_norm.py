"""Dropout, residual sum and norm of a block. Oracle: `reference/residual_norm.py`."""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlpfast import _ext
from vlpfast.ops._checks import check_devices, check_seed
from vlpfast.ops._dispatch import Implementation, Op
from vlpfast.ops._once import once_differentiable
from vlpfast.ops._rows import fused_rejects, seed_tensor, wide
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
        impl: "auto", "reference", "cpp", "triton" or "apex". C++ and Triton take fp32 and bf16, are
            one pass over the rows forward and one backward, and keep s and two numbers a row for
            it. "apex" is NVIDIA apex's fused norm, where it is installed, for the plain norm: no
            residual, no dropout, with a weight and, for "layer", a bias.

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
    check_devices(x.device, prefix="residual_norm: ", residual=residual)
    dtypes = [x.dtype] if residual is None else [x.dtype, residual.dtype]
    run = _OP.choose(
        impl,
        x.device,
        dtypes=dtypes,
        columns=x.shape[-1],
        plain=residual is None and dropout_p == 0,
        affine=weight is not None and (bias is None) == (kind == "rms"),
    )
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
    check_devices(x.device, prefix=f"{op}: ", **vectors)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0 and seed is None:
        raise ValueError(f"{op}: dropout_p={dropout_p} needs a seed")
    check_seed(seed, prefix=f"{op}: ")


torch.library.define(
    "vlpfast::residual_norm_fwd",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor seed, bool rms,"
    " float dropout_p, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "vlpfast::residual_norm_bwd",
    "(Tensor grad_normed, Tensor? grad_total, Tensor total, Tensor? weight, Tensor mean,"
    " Tensor rstd, Tensor seed, bool rms, float dropout_p, bool split)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("vlpfast::residual_norm_fwd")
def _fake_fwd(x, residual, weight, bias, seed, rms, dropout_p, eps):
    total = x if residual is None else x.new_empty((), dtype=residual.dtype)
    dtype = torch.promote_types(x.dtype, total.dtype)
    rows = x.new_empty(x.shape[0], dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x, dtype=dtype), rows, torch.empty_like(rows)


@torch.library.register_fake("vlpfast::residual_norm_bwd")
def _fake_bwd(grad_normed, grad_total, total, weight, mean, rstd, seed, rms, dropout_p, split):
    grad_x = grad_normed.new_empty(grad_normed.shape[0] if split else 0, grad_normed.shape[1])
    vector = total.new_empty(total.shape[1], dtype=torch.float32)
    return torch.empty_like(total), grad_x, vector, torch.empty_like(vector)


_cpp_fwd = torch.ops.vlpfast.residual_norm_fwd.default
_cpp_bwd = torch.ops.vlpfast.residual_norm_bwd.default


class _ResidualNorm(torch.autograd.Function):
    """Over rows (T, D). The sum is returned and kept; the mask is drawn again in the backward."""

    @staticmethod
    def forward(ctx, backend, x, residual, weight, bias, seed, rms, dropout_p, eps):
        ctx.set_materialize_grads(False)
        fwd = _triton("residual_norm_fwd") if backend == "triton" else _cpp_fwd
        normed, total, mean, rstd = fwd(
            x, residual, wide(weight), wide(bias), seed, rms, dropout_p, eps
        )
        ctx.save_for_backward(total, weight, mean, rstd, seed)
        ctx.backend, ctx.rms, ctx.dropout_p = backend, rms, dropout_p
        ctx.x_dtype = x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return normed, total

    @staticmethod
    @once_differentiable("residual_norm")
    def backward(ctx, grad_normed, grad_total):
        if grad_normed is None and grad_total is None:
            return (None,) * 9
        total, weight, mean, rstd, seed = ctx.saved_tensors
        if grad_normed is None:
            grad_normed = torch.zeros_like(total, dtype=ctx.x_dtype)
        bwd = _triton("residual_norm_bwd") if ctx.backend == "triton" else _cpp_bwd
        # Without dropout, and with one dtype, x and the residual have the same gradient.
        split = ctx.dropout_p > 0 or ctx.x_dtype != total.dtype
        grad_sum, grad_x, grad_weight, grad_bias = bwd(
            grad_normed.contiguous(),
            None if grad_total is None else grad_total.contiguous(),
            total, wide(weight), mean, rstd, seed, ctx.rms, ctx.dropout_p, split,
        )  # fmt: skip
        return (
            None,
            grad_x if split else grad_sum,
            grad_sum if ctx.needs_input_grad[2] else None,
            grad_weight.to(weight.dtype) if ctx.needs_input_grad[3] else None,
            grad_bias.to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None,
            *(None,) * 4,
        )


def _triton(name):
    from vlpfast.kernels import residual_norm

    return getattr(residual_norm, name)


def _fused(backend, x, residual, weight, bias, *, kind, dropout_p, seed, eps):
    rows = lambda t: None if t is None else t.reshape(-1, t.shape[-1]).contiguous()
    normed, total = _ResidualNorm.apply(
        backend, rows(x), rows(residual), weight, bias, seed_tensor(seed, x.device),
        kind == "rms", dropout_p, eps,
    )  # fmt: skip
    return normed.view(x.shape), total.view(x.shape)


def _apex(x, residual, weight, bias, *, kind, dropout_p, seed, eps):
    norms = importlib.import_module("apex.normalization.fused_layer_norm")
    shape = weight.shape
    if kind == "rms":
        return norms.fused_rms_norm_affine(x, weight, shape, eps), x
    return norms.fused_layer_norm_affine(x, weight, bias, shape, eps), x


def _apex_missing() -> str | None:
    if importlib.util.find_spec("apex") is None:
        return "apex is not installed"
    return None if torch.cuda.is_available() else "no CUDA GPU here"


def _apex_rejects(
    *, device: torch.device, dtypes: list[torch.dtype], columns: int, plain: bool, affine: bool
) -> str | None:
    if device.type != "cuda":
        return f"runs on cuda, got {device.type} tensors"
    if not plain:
        return "has the norm alone: no residual, no dropout"
    return None if affine else "needs a weight, and a bias for 'layer' alone"


_OP = Op(
    "residual_norm",
    {
        "reference": Implementation(reference.residual_norm),
        "cpp": Implementation(partial(_fused, "cpp"), _ext.cpp_missing, fused_rejects("cpp")),
        "triton": Implementation(
            partial(_fused, "triton"), _ext.triton_missing, fused_rejects("triton")
        ),
        "apex": Implementation(_apex, _apex_missing, _apex_rejects),
    },
    auto={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
)
