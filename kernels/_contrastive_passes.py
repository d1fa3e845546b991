"""The contrastive passes over a stored tile of similarities: kernels only.

All have one shape: a program walks down `rows_per_program` rows of its BLOCK_N columns. Rows are
finished a tile at a time, columns at the end of the walk; both go to a workspace of one line for
each program that shares them: `row_part` (count, programs, M), `col_part` (count, programs, N).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlpfast.kernels._common import stream_key
from vlpfast.kernels._contrastive import (
    MASKED,
    NO_INDEX,
    best_of,
    comes_after,
    gumbel,
    last_winner,
    load_tile,
    positives,
    store_tile,
    with_diagonal,
)  # fmt: skip


@triton.jit
def _walk(M, N, rows_per_program, BLOCK_N: tl.constexpr):
    """First row, end row and columns of this program."""
    begin = tl.program_id(1) * rows_per_program
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    return begin, tl.minimum(begin + rows_per_program, M), offs_n, offs_n < N


@triton.jit
def _line(part_ptr, q, offs, AXIS: tl.constexpr, X):
    """Pointers into line (q, program_id(AXIS)) of a (count, programs, X) workspace."""
    line = (q * tl.num_programs(AXIS) + tl.program_id(AXIS)).to(tl.int64)
    return part_ptr + line * X + offs


@triton.jit(do_not_specialize=["diag_offset"])
def stats_kernel(
    sims_ptr, scale_ptr, row_ids_ptr, col_ids_ptr, diag_ptr, row_part_ptr, col_part_ptr,
    M, N, stride, diag_offset, rows_per_program,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    begin, end, offs_n, mask_n = _walk(M, N, rows_per_program, BLOCK_N)
    scale = tl.load(scale_ptr)
    # Every place of the tile keeps a running log-sum-exp of its own down the walk, at one
    # exponential an element; places of one column meet at the end.
    n_i = tl.full((BLOCK_M, BLOCK_N), MASKED, tl.float32)
    k_i = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    pos_i = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        mask = mask_m[:, None] & mask_n[None, :]
        s = load_tile(sims_ptr, stride, offs_m, offs_n, mask)
        s = with_diagonal(s, diag_ptr, diag_offset, offs_m, offs_n, mask_m)
        positive = positives(row_ids_ptr, col_ids_ptr, diag_offset, offs_m, offs_n, mask_m, mask_n)
        s_pos = tl.where(positive & mask, s, 0.0)
        z = tl.where(mask, s * scale, MASKED)
        t_m = tl.max(z, 1)
        p = tl.exp(z - t_m[:, None])
        tl.store(_line(row_part_ptr, 0, offs_m, 0, M), t_m, mask=mask_m)
        tl.store(_line(row_part_ptr, 1, offs_m, 0, M), tl.sum(p, 1), mask=mask_m)
        tl.store(_line(row_part_ptr, 2, offs_m, 0, M), tl.sum(s_pos, 1), mask=mask_m)
        if col_part_ptr is not None:
            e = tl.exp(-tl.abs(z - n_i))
            k_i = tl.where(z > n_i, k_i * e + 1.0, k_i + e)
            n_i = tl.maximum(n_i, z)
            pos_i += s_pos
    if col_part_ptr is not None:
        top = tl.max(n_i, 0)
        total = tl.sum(k_i * tl.exp(n_i - top[None, :]), 0)
        tl.store(_line(col_part_ptr, 0, offs_n, 1, N), top, mask=mask_n)
        tl.store(_line(col_part_ptr, 1, offs_n, 1, N), total, mask=mask_n)
        tl.store(_line(col_part_ptr, 2, offs_n, 1, N), tl.sum(pos_i, 0), mask=mask_n)


@triton.jit(do_not_specialize=["diag_offset"])
def teacher_kernel(
    sims_ptr, teacher_ptr, scale_ptr, diag_ptr, row_part_ptr,
    M, N, stride, teacher_stride, diag_offset, rows_per_program,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    begin, end, offs_n, mask_n = _walk(M, N, rows_per_program, BLOCK_N)
    scale = tl.load(scale_ptr)
    for start in range(begin, end, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        mask = mask_m[:, None] & mask_n[None, :]
        s = load_tile(sims_ptr, stride, offs_m, offs_n, mask)
        s = with_diagonal(s, diag_ptr, diag_offset, offs_m, offs_n, mask_m)
        t = load_tile(teacher_ptr, teacher_stride, offs_m, offs_n, mask)
        z = tl.where(mask, t * scale, MASKED)
        t_m = tl.max(z, 1)
        p = tl.exp(z - t_m[:, None])
        tl.store(_line(row_part_ptr, 0, offs_m, 0, M), t_m, mask=mask_m)
        tl.store(_line(row_part_ptr, 1, offs_m, 0, M), tl.sum(p, 1), mask=mask_m)
        tl.store(_line(row_part_ptr, 2, offs_m, 0, M), tl.sum(p * s, 1), mask=mask_m)


@triton.jit(do_not_specialize=["diag_offset"])
def grad_kernel(
    sims_ptr, teacher_ptr, scale_ptr, row_ids_ptr, col_ids_ptr, diag_ptr,
    row_max_ptr, row_sum_ptr, col_max_ptr, col_sum_ptr, row_weight_ptr, col_weight_ptr,
    teacher_max_ptr, teacher_sum_ptr, row_part_ptr,
    M, N, stride, teacher_stride, diag_offset, rows_per_program, smoothing, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    begin, end, offs_n, mask_n = _walk(M, N, rows_per_program, BLOCK_N)
    scale = tl.load(scale_ptr)
    if col_max_ptr is not None:
        col_max = tl.load(col_max_ptr + offs_n, mask=mask_n, other=0.0)
        col_factor = 1.0 / tl.load(col_sum_ptr + offs_n, mask=mask_n, other=1.0)
        col_weight = tl.load(col_weight_ptr + offs_n, mask=mask_n, other=0.0)
    for start in range(begin, end, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        mask = mask_m[:, None] & mask_n[None, :]
        s = load_tile(sims_ptr, stride, offs_m, offs_n, mask)
        s = with_diagonal(s, diag_ptr, diag_offset, offs_m, offs_n, mask_m)
        positive = positives(row_ids_ptr, col_ids_ptr, diag_offset, offs_m, offs_n, mask_m, mask_n)
        row_max = tl.load(row_max_ptr + offs_m, mask=mask_m, other=0.0)
        row_factor = 1.0 / tl.load(row_sum_ptr + offs_m, mask=mask_m, other=1.0)
        weight = tl.load(row_weight_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        # The select keeps the product rounded, as `stats_kernel` had it: inside a fused subtraction
        # the largest p of a row would not be 1 / row_sum.
        z = tl.where(mask, s * scale, 0.0)
        g = tl.exp(z - row_max[:, None]) * row_factor[:, None] - smoothing
        if col_max_ptr is not None:
            g += tl.exp(z - col_max[None, :]) * col_factor[None, :]
            weight = weight + col_weight[None, :]
        g -= tl.where(positive, weight, 0.0)
        if teacher_ptr is not None:
            t = load_tile(teacher_ptr, teacher_stride, offs_m, offs_n, mask)
            teacher_max = tl.load(teacher_max_ptr + offs_m, mask=mask_m, other=0.0)
            teacher_sum = tl.load(teacher_sum_ptr + offs_m, mask=mask_m, other=1.0)
            p = tl.exp(tl.where(mask, t * scale, 0.0) - teacher_max[:, None])
            g -= p * (alpha / teacher_sum)[:, None]
        row_dot = tl.sum(tl.where(mask, g * s, 0.0), 1)
        tl.store(_line(row_part_ptr, 0, offs_m, 0, M), row_dot, mask=mask_m)
        store_tile(sims_ptr, stride, offs_m, offs_n, mask, g)


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], relative error 2e-7: x times a polynomial, Chebyshev fit."""
    p = x * 0.005253457929939032 - 0.02958850748836994
    p = p * x + 0.07836166769266129
    p = p * x - 0.13674770295619965
    p = p * x + 0.19111430644989014
    p = p * x - 0.24844369292259216
    p = p * x + 0.33319270610809326
    p = p * x - 0.49999502301216125
    return (p * x + 1.0) * x


@triton.jit(do_not_specialize=["diag_offset"])
def sigmoid_kernel(
    sims_ptr, teacher_ptr, scale_ptr, bias_ptr, row_ids_ptr, col_ids_ptr, diag_ptr,
    row_part_ptr, col_part_ptr,
    M, N, stride, teacher_stride, diag_offset, rows_per_program, positive_target, negative_target,
    alpha,
    WRITE_GRAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    begin, end, offs_n, mask_n = _walk(M, N, rows_per_program, BLOCK_N)
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        mask = mask_m[:, None] & mask_n[None, :]
        s = load_tile(sims_ptr, stride, offs_m, offs_n, mask)
        s = with_diagonal(s, diag_ptr, diag_offset, offs_m, offs_n, mask_m)
        positive = positives(row_ids_ptr, col_ids_ptr, diag_offset, offs_m, offs_n, mask_m, mask_n)
        target = tl.where(positive, positive_target, negative_target)
        if teacher_ptr is not None:
            t = load_tile(teacher_ptr, teacher_stride, offs_m, offs_n, mask)
            target += alpha / (1.0 + tl.exp(-(t * scale + bias)))
        z = s * scale + bias
        e = tl.exp(-tl.abs(z))
        sigmoid = tl.where(z >= 0, 1.0, e) / (1.0 + e)
        loss = tl.where(mask, tl.maximum(z, 0.0) + _log1p(e) - target * z, 0.0)
        g = tl.where(mask, sigmoid - target, 0.0)
        tl.store(_line(row_part_ptr, 0, offs_m, 0, M), tl.sum(loss, 1), mask=mask_m)
        tl.store(_line(row_part_ptr, 1, offs_m, 0, M), tl.sum(g * s, 1), mask=mask_m)
        tl.store(_line(row_part_ptr, 2, offs_m, 0, M), tl.sum(g, 1), mask=mask_m)
        if col_part_ptr is not None:
            acc += loss
        if WRITE_GRAD:
            store_tile(sims_ptr, stride, offs_m, offs_n, mask, g)
    if col_part_ptr is not None:
        tl.store(_line(col_part_ptr, 0, offs_n, 1, N), tl.sum(acc, 0), mask=mask_n)


@triton.jit(do_not_specialize=["diag_offset", "first_row", "row_offset", "side", "rank"])
def negatives_kernel(
    sims_ptr, scale_ptr, seed_ptr, row_ids_ptr, col_ids_ptr,
    row_best_ptr, row_index_ptr, col_best_ptr, col_index_ptr,
    row_part_ptr, row_part_index_ptr, col_part_ptr, col_part_index_ptr,
    M, N, stride, diag_offset, first_row, row_offset, side, K, rank, rows_per_program,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    begin, end, offs_n, mask_n = _walk(M, N, rows_per_program, BLOCK_N)
    scale = tl.load(scale_ptr)
    if col_part_ptr is not None:
        col_last, col_last_index = last_winner(col_best_ptr, col_index_ptr, offs_n, mask_n, K, rank)
        acc = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
        acc_index = tl.full((BLOCK_M, BLOCK_N), NO_INDEX, tl.int32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        col_key = stream_key(seed, 2 * (first_row + offs_n).to(tl.int64) + 1 - side)
    for start in range(begin, end, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        mask = mask_m[:, None] & mask_n[None, :]
        s = load_tile(sims_ptr, stride, offs_m, offs_n, mask)
        positive = positives(row_ids_ptr, col_ids_ptr, diag_offset, offs_m, offs_n, mask_m, mask_n)
        allowed = mask & (positive == 0)
        columns = tl.broadcast_to(offs_n[None, :], (BLOCK_M, BLOCK_N))
        rows = tl.broadcast_to((row_offset + offs_m)[:, None], (BLOCK_M, BLOCK_N))

        # A fused multiply-add by name, so that every rank's launch has the same bits.
        noise = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if seed_ptr is not None:
            row_key = stream_key(seed, 2 * (first_row + row_offset + offs_m).to(tl.int64) + side)
            noise = gumbel(row_key[:, None], offs_n[None, :])
        score = tl.fma(s, tl.zeros_like(s) + scale, noise)
        last, last_index = last_winner(row_best_ptr, row_index_ptr, offs_m, mask_m, K, rank)
        keep = allowed & comes_after(score, columns, last[:, None], last_index[:, None])
        best, index = best_of(tl.where(keep, score, float("-inf")), columns, 1)
        tl.store(_line(row_part_ptr, 0, offs_m, 0, M), best, mask=mask_m)
        tl.store(_line(row_part_index_ptr, 0, offs_m, 0, M), index, mask=mask_m)

        if col_part_ptr is not None:
            if seed_ptr is not None:
                noise = gumbel(col_key[None, :], (row_offset + offs_m)[:, None])
            score = tl.fma(s, tl.zeros_like(s) + scale, noise)
            keep = allowed & comes_after(score, rows, col_last[None, :], col_last_index[None, :])
            better = keep & (score > acc)
            acc, acc_index = tl.where(better, score, acc), tl.where(better, rows, acc_index)
    if col_part_ptr is not None:
        best, index = best_of(acc, acc_index, 0)
        tl.store(_line(col_part_ptr, 0, offs_n, 1, N), best, mask=mask_n)
        tl.store(_line(col_part_index_ptr, 0, offs_n, 1, N), index, mask=mask_n)


@triton.jit(do_not_specialize=["diag_offset"])
def hinge_kernel(
    sims_ptr, row_ids_ptr, col_ids_ptr, row_pair_ptr, col_pair_ptr, row_part_ptr, col_part_ptr,
    M, N, stride, diag_offset, rows_per_program, margin,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    begin, end, offs_n, mask_n = _walk(M, N, rows_per_program, BLOCK_N)
    col_pair = tl.load(col_pair_ptr + offs_n, mask=mask_n, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        mask = mask_m[:, None] & mask_n[None, :]
        s = load_tile(sims_ptr, stride, offs_m, offs_n, mask)
        positive = positives(row_ids_ptr, col_ids_ptr, diag_offset, offs_m, offs_n, mask_m, mask_n)
        row_pair = tl.load(row_pair_ptr + offs_m, mask=mask_m, other=0.0)
        allowed = mask & (positive == 0)
        a = tl.where(allowed, margin + s - row_pair[:, None], 0.0)
        b = tl.where(allowed, margin + s - col_pair[None, :], 0.0)
        row_on, col_on = (a > 0).to(tl.float32), (b > 0).to(tl.float32)
        loss = tl.sum(tl.maximum(a, 0.0) + tl.maximum(b, 0.0), 1)
        tl.store(_line(row_part_ptr, 0, offs_m, 0, M), loss, mask=mask_m)
        tl.store(_line(row_part_ptr, 1, offs_m, 0, M), tl.sum(row_on, 1), mask=mask_m)
        acc += col_on
        store_tile(sims_ptr, stride, offs_m, offs_n, mask, row_on + col_on)
    tl.store(_line(col_part_ptr, 0, offs_n, 1, N), tl.sum(acc, 0), mask=mask_n)
