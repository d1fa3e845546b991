"""Dropout, residual sum and LayerNorm or RMSNorm: one program per row forward, one per block of
rows backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.kernels._common import AotCase
from vlpfast.kernels._rows import block_and_warps, dropout_scalars, dropped, row_blocks


@triton.jit
def _residual_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, total_ptr, normed_ptr, mean_ptr, rstd_ptr,
    D, threshold, scale, eps,
    RMS: tl.constexpr, DROPOUT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_D)
    mask = offs < D
    at = row * D + offs

    s = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        s = dropped(s, row, offs, seed_ptr, threshold, scale)
    if HAS_RESIDUAL:
        s += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    # The norm is that of the sum as it is stored, which is what the backward reads.
    stored = s.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + at, stored, mask=mask)
    s = stored.to(tl.float32)

    mean = tl.full([], 0.0, tl.float32)
    if not RMS:
        mean = tl.sum(s, axis=0) / D
    centred = tl.where(mask, s - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)
    y = centred * rstd
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + offs, mask=mask, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs, mask=mask, other=0.0)
    tl.store(normed_ptr + at, y.to(normed_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _residual_norm_bwd_kernel(
    grad_normed_ptr, grad_total_ptr, total_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr,
    grad_sum_ptr, grad_x_ptr, partial_ptr,
    num_rows, rows_per_block, D, threshold, scale,
    RMS: tl.constexpr, DROPOUT: tl.constexpr, HAS_GRAD_TOTAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_D)
    mask = offs < D
    weight = tl.full([BLOCK_D], 1.0, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    grad_weight = tl.zeros([BLOCK_D], tl.float32)
    grad_bias = tl.zeros([BLOCK_D], tl.float32)

    first = pid * rows_per_block
    for i in range(0, tl.minimum(rows_per_block, num_rows - first)):
        row = first + i
        at = row * D + offs
        rstd = tl.load(rstd_ptr + row)
        total = tl.load(total_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed_ptr + at, mask=mask, other=0.0).to(tl.float32)
        xhat = tl.where(mask, (total - tl.load(mean_ptr + row)) * rstd, 0.0)
        grad_weight += grad * xhat
        grad_bias += grad
        grad *= weight
        along = tl.sum(grad * xhat, axis=0) / D
        if RMS:
            out = rstd * (grad - xhat * along)
        else:
            out = rstd * (grad - tl.sum(grad, axis=0) / D - xhat * along)
        if HAS_GRAD_TOTAL:
            out += tl.load(grad_total_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_sum_ptr + at, out.to(grad_sum_ptr.dtype.element_ty), mask=mask)
        if SPLIT:
            if DROPOUT:
                out = dropped(out, row, offs, seed_ptr, threshold, scale)
            tl.store(grad_x_ptr + at, out.to(grad_x_ptr.dtype.element_ty), mask=mask)

    out_ptr = partial_ptr + pid * 2 * D + offs
    tl.store(out_ptr, grad_weight, mask=mask)
    tl.store(out_ptr + D, grad_bias, mask=mask)


def residual_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor,
    rms: bool,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """normed (T, D) in x's dtype, total (T, D), mean (T,), rstd (T,); see ops.residual_norm.

    x and residual are contiguous (T, D), weight and bias fp32.
    """
    num_rows, D = x.shape
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    normed, total = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    mean, rstd = (torch.empty(num_rows, device=x.device) for _ in range(2))
    if num_rows == 0:
        return normed, total, mean, rstd
    block, num_warps = block_and_warps(D)
    threshold, scale = dropout_scalars(dropout_p)
    _residual_norm_fwd_kernel[(num_rows,)](
        x, residual, weight, bias, seed, total, normed, mean, rstd, D, threshold, scale, eps,
        RMS=rms, DROPOUT=dropout_p > 0, HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, BLOCK_D=block,
        num_warps=num_warps,
    )  # fmt: skip
    return normed, total, mean, rstd


def residual_norm_bwd(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor,
    rms: bool,
    dropout_p: float,
    split: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the sum (T, D), of x ((T, D) if `split`, else none), of weight and bias (D,)."""
    num_rows, D = total.shape
    grad_sum = torch.empty_like(total)
    grad_x = grad_normed.new_empty(num_rows if split else 0, D)
    if num_rows == 0:
        zeros = torch.zeros(2, D, device=total.device)
        return grad_sum, grad_x, zeros[0], zeros[1]
    count, rows_per_block = row_blocks(num_rows)
    partial = torch.empty(count, 2, D, device=total.device)
    block, num_warps = block_and_warps(D)
    threshold, scale = dropout_scalars(dropout_p)
    _residual_norm_bwd_kernel[(count,)](
        grad_normed, grad_total, total, weight, mean, rstd, seed, grad_sum, grad_x, partial,
        num_rows, rows_per_block, D, threshold, scale,
        RMS=rms, DROPOUT=dropout_p > 0, HAS_GRAD_TOTAL=grad_total is not None,
        HAS_WEIGHT=weight is not None, SPLIT=split, BLOCK_D=block, num_warps=num_warps,
    )  # fmt: skip
    grad_weight, grad_bias = partial.sum(0).unbind(0)
    return grad_sum, grad_x, grad_weight.contiguous(), grad_bias.contiguous()


def _aot_case(direction: str, columns: int, rms: bool, max_registers: int) -> AotCase:
    """bf16 branch beside an fp32 residual, with dropout: the widest use of registers."""
    block, num_warps = block_and_warps(columns)
    flags = {"RMS": rms, "DROPOUT": True, "HAS_WEIGHT": True, "BLOCK_D": block}
    if direction == "fwd":
        kernel, flags = _residual_norm_fwd_kernel, {**flags, "HAS_RESIDUAL": True, "HAS_BIAS": True}
        types = {"x_ptr": "*bf16", "residual_ptr": "*fp32", "weight_ptr": "*fp32",
                 "bias_ptr": "*fp32", "seed_ptr": "*i64", "total_ptr": "*fp32",
                 "normed_ptr": "*bf16", "mean_ptr": "*fp32", "rstd_ptr": "*fp32",
                 "D": "i32", "threshold": "i32", "scale": "fp32", "eps": "fp32"}  # fmt: skip
    else:
        kernel, flags = _residual_norm_bwd_kernel, {**flags, "HAS_GRAD_TOTAL": True, "SPLIT": True}
        types = {"grad_normed_ptr": "*bf16", "grad_total_ptr": "*fp32", "total_ptr": "*fp32",
                 "weight_ptr": "*fp32", "mean_ptr": "*fp32", "rstd_ptr": "*fp32",
                 "seed_ptr": "*i64", "grad_sum_ptr": "*fp32", "grad_x_ptr": "*bf16",
                 "partial_ptr": "*fp32", "num_rows": "i32", "rows_per_block": "i32", "D": "i32",
                 "threshold": "i32", "scale": "fp32"}  # fmt: skip
    return AotCase(
        name=f"residual_norm-{direction}-D{columns}{'-rms' if rms else ''}",
        kernel=kernel,
        types=types,
        constants=flags,
        divisible=("D",),
        num_warps=num_warps,
        max_registers=max_registers,
        # fp32 and bf16 rows are read in different layouts; one is exchanged through shared memory.
        max_shared_bytes=4 * block,
    )


AOT_CASES = [
    _aot_case("fwd", 768, rms=False, max_registers=64),
    _aot_case("fwd", 4096, rms=True, max_registers=64),
    _aot_case("bwd", 768, rms=False, max_registers=128),
    _aot_case("bwd", 1024, rms=True, max_registers=128),
    _aot_case("bwd", 4096, rms=False, max_registers=168),
]
