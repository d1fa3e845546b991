"""Bias, GELU and dropout between the two matrices of an MLP, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.kernels._common import AotCase
from vlpfast.kernels._rows import block_and_warps, dropout_scalars, dropped, row_blocks


@triton.jit
def _gate(y, QUICK: tl.constexpr):
    """What y is multiplied by, and the derivative of that in y."""
    if QUICK:
        s = tl.sigmoid(1.702 * y)
        return s, 1.702 * s * (1.0 - s)
    return 0.5 * (1.0 + tl.erf(y * 0.7071067811865476)), 0.3989422804014327 * tl.exp(-0.5 * y * y)


@triton.jit
def _bias_gelu_fwd_kernel(
    x_ptr, bias_ptr, seed_ptr, out_ptr,
    D, threshold, scale,
    QUICK: tl.constexpr, DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_D)
    mask = offs < D
    y = tl.load(x_ptr + row * D + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs, mask=mask, other=0.0)
    gate, _ = _gate(y, QUICK)
    y *= gate
    if DROPOUT:
        y = dropped(y, row, offs, seed_ptr, threshold, scale)
    tl.store(out_ptr + row * D + offs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_gelu_bwd_kernel(
    grad_output_ptr, x_ptr, bias_ptr, seed_ptr, grad_x_ptr, partial_ptr,
    num_rows, rows_per_block, D, threshold, scale,
    QUICK: tl.constexpr, DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    # Columns are split over programs too: nothing couples them.
    offs = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs < D
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs, mask=mask, other=0.0)
    grad_bias = tl.zeros([BLOCK_D], tl.float32)

    first = pid * rows_per_block
    for i in range(0, tl.minimum(rows_per_block, num_rows - first)):
        row = first + i
        at = row * D + offs
        y = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) + bias
        grad = tl.load(grad_output_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            grad = dropped(grad, row, offs, seed_ptr, threshold, scale)
        gate, density = _gate(y, QUICK)
        # The density is 0 far out, where y may be infinite.
        grad *= gate + tl.where(density == 0.0, 0.0, y * density)
        grad_bias += grad
        tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + pid * D + offs, grad_bias, mask=mask)


# Columns of one backward program; a wider row is split.
_BWD_BLOCK = 1024


def bias_gelu_fwd(
    x: Tensor, bias: Tensor | None, seed: Tensor, quick: bool, dropout_p: float
) -> Tensor:
    """(T, D) in x's dtype; x is contiguous, bias fp32. See ops.bias_gelu."""
    num_rows, D = x.shape
    out = torch.empty_like(x)
    if num_rows == 0:
        return out
    block, num_warps = block_and_warps(D)
    threshold, scale = dropout_scalars(dropout_p)
    _bias_gelu_fwd_kernel[(num_rows,)](
        x, bias, seed, out, D, threshold, scale,
        QUICK=quick, DROPOUT=dropout_p > 0, HAS_BIAS=bias is not None, BLOCK_D=block,
        num_warps=num_warps,
    )  # fmt: skip
    return out


def bias_gelu_bwd(
    grad_output: Tensor,
    x: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    quick: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of x (T, D) and of the bias (D,)."""
    num_rows, D = x.shape
    grad_x = torch.empty_like(x)
    if num_rows == 0:
        return grad_x, torch.zeros(D, device=x.device)
    count, rows_per_block = row_blocks(num_rows)
    partial = torch.empty(count, D, device=x.device)
    block, num_warps = block_and_warps(min(D, _BWD_BLOCK))
    threshold, scale = dropout_scalars(dropout_p)
    _bias_gelu_bwd_kernel[(count, triton.cdiv(D, block))](
        grad_output, x, bias, seed, grad_x, partial, num_rows, rows_per_block, D, threshold, scale,
        QUICK=quick, DROPOUT=dropout_p > 0, HAS_BIAS=bias is not None, BLOCK_D=block,
        num_warps=num_warps,
    )  # fmt: skip
    return grad_x, partial.sum(0)


def _aot_case(direction: str, columns: int, quick: bool, max_registers: int) -> AotCase:
    block, num_warps = block_and_warps(columns)
    types = {"x_ptr": "*bf16", "bias_ptr": "*fp32", "seed_ptr": "*i64"}
    sizes = {"D": "i32", "threshold": "i32", "scale": "fp32"}
    if direction == "fwd":
        kernel, types = _bias_gelu_fwd_kernel, {**types, "out_ptr": "*bf16", **sizes}
    else:
        kernel = _bias_gelu_bwd_kernel
        types = {"grad_output_ptr": "*bf16", **types, "grad_x_ptr": "*bf16", "partial_ptr": "*fp32",
                 "num_rows": "i32", "rows_per_block": "i32", **sizes}  # fmt: skip
    return AotCase(
        name=f"bias_gelu-{direction}-D{columns}{'-quick' if quick else ''}",
        kernel=kernel,
        types=types,
        constants={"QUICK": quick, "DROPOUT": True, "HAS_BIAS": True, "BLOCK_D": block},
        divisible=("D",),
        num_warps=num_warps,
        max_registers=max_registers,
        max_shared_bytes=4 * block,
    )


AOT_CASES = [
    _aot_case("fwd", 3072, quick=False, max_registers=64),
    _aot_case("fwd", 4096, quick=True, max_registers=64),
    _aot_case("bwd", _BWD_BLOCK, quick=False, max_registers=96),
    _aot_case("bwd", _BWD_BLOCK, quick=True, max_registers=96),
]
