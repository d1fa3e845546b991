"""Bias, GELU and dropout between the two matrices of an MLP. Oracle: `reference/bias_gelu.py`."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vlpfast import _ext
from vlpfast.ops._dispatch import Implementation, Op
from vlpfast.ops._once import once_differentiable
from vlpfast.ops._rows import fused_rejects, seed_tensor, wide
from vlpfast.ops.reference import bias_gelu as reference
from vlpfast.ops.residual_norm import check_rows


def bias_gelu(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    kind: Literal["gelu", "quick_gelu"] = "gelu",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """dropout(act(x + bias)).

        gelu:       act(y) = y * (1 + erf(y / sqrt(2))) / 2
        quick_gelu: act(y) = y * sigmoid(1.702 * y)

    Args:
        x (..., D): output of the first linear layer without its bias, floating point.
        bias (D,): that layer's bias; None for 0.
        kind: "gelu" (exact) or "quick_gelu" (CLIP's).
        dropout_p: probability of dropping an output, in [0, 1); the others grow by 1 / (1 - p).
        seed: int or 0-d int64 tensor, required with dropout. The mask is a function of (seed, row,
            column) as in `residual_norm`.
        impl: "auto", "reference", "cpp" or "triton". The last two take fp32 and bf16 and keep x
            alone for the backward.

    Returns:
        Shape and dtype of `x`.

    Source: Hendrycks & Gimpel 2016, eq. 1 and section 2, arXiv:1606.08415; quick_gelu as in
        openai/CLIP clip/model.py.
    """
    if kind not in ("gelu", "quick_gelu"):
        raise ValueError(f"bias_gelu: kind must be 'gelu' or 'quick_gelu', got {kind!r}")
    check_rows("bias_gelu", x, dropout_p, seed, bias=bias)
    run = _OP.choose(impl, x.device, dtypes=[x.dtype], columns=x.shape[-1])
    return run(x, bias, kind=kind, dropout_p=dropout_p, seed=seed)


torch.library.define(
    "vlpfast::bias_gelu_fwd",
    "(Tensor x, Tensor? bias, Tensor seed, bool quick, float dropout_p) -> Tensor",
)
torch.library.define(
    "vlpfast::bias_gelu_bwd",
    "(Tensor grad_output, Tensor x, Tensor? bias, Tensor seed, bool quick, float dropout_p)"
    " -> (Tensor, Tensor)",
)


@torch.library.register_fake("vlpfast::bias_gelu_fwd")
def _fake_fwd(x, bias, seed, quick, dropout_p):
    return torch.empty_like(x)


@torch.library.register_fake("vlpfast::bias_gelu_bwd")
def _fake_bwd(grad_output, x, bias, seed, quick, dropout_p):
    return torch.empty_like(x), x.new_empty(x.shape[1], dtype=torch.float32)


_cpp_fwd = torch.ops.vlpfast.bias_gelu_fwd.default
_cpp_bwd = torch.ops.vlpfast.bias_gelu_bwd.default


class _BiasGelu(torch.autograd.Function):
    """Over rows (T, D); keeps x, and draws the mask again in the backward."""

    @staticmethod
    def forward(ctx, backend, x, bias, seed, quick, dropout_p):
        ctx.save_for_backward(x, bias, seed)
        ctx.backend, ctx.quick, ctx.dropout_p = backend, quick, dropout_p
        fwd = _triton("bias_gelu_fwd") if backend == "triton" else _cpp_fwd
        return fwd(x, wide(bias), seed, quick, dropout_p)

    @staticmethod
    @once_differentiable("bias_gelu")
    def backward(ctx, grad_output):
        x, bias, seed = ctx.saved_tensors
        bwd = _triton("bias_gelu_bwd") if ctx.backend == "triton" else _cpp_bwd
        grad_x, grad_bias = bwd(
            grad_output.contiguous(), x, wide(bias), seed, ctx.quick, ctx.dropout_p
        )
        grad_bias = grad_bias.to(bias.dtype) if ctx.needs_input_grad[2] else None
        return None, grad_x, grad_bias, None, None, None


def _triton(name):
    from vlpfast.kernels import bias_gelu

    return getattr(bias_gelu, name)


def _fused(backend, x, bias, *, kind, dropout_p, seed):
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    seed = seed_tensor(seed, x.device)
    return _BiasGelu.apply(backend, rows, bias, seed, kind == "quick_gelu", dropout_p).view(x.shape)


_OP = Op(
    "bias_gelu",
    {
        "reference": Implementation(reference.bias_gelu),
        "cpp": Implementation(partial(_fused, "cpp"), _ext.cpp_missing, fused_rejects("cpp")),
        "triton": Implementation(
            partial(_fused, "triton"), _ext.triton_missing, fused_rejects("triton")
        ),
    },
    auto={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
)
