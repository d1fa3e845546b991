"""Shared by the contrastive kernels: reading a tile, Gumbel noise, how tiles are dealt to programs,
and the merging of what the programs leave, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.kernels._common import draw

# Stands for -inf where a difference of two must not be NaN.
MASKED = tl.constexpr(-1e30)
# An exponential serves a row and a column as long as no sum falls below this: what was flushed to
# zero in it, terms under 2**-126, is then less than 2**-40 of the sum.
TINY = tl.constexpr(1e-24)
NO_INDEX = tl.constexpr(0x7FFFFFFF)

# A pass reads tiles of 8 x 256: a warp loads 16 bytes a lane of one bf16 row. Twice the rows would
# leave room for one program on a multiprocessor where columns are summed too (160 registers).
BLOCK_M, BLOCK_N, NUM_WARPS = 8, 256, 8
# A program walks down up to 32 tiles of its columns, fewer where that would leave the GPU idle.
_MOST_ROWS, _MANY_PROGRAMS = 256, 512
# How many partial results of how many rows or columns a program merges at once.
MERGE_BLOCKS = {"BLOCK_P": 64, "BLOCK_X": 32}


@triton.jit
def load_tile(sims_ptr, stride, offs_m, offs_n, mask):
    """fp32 (BLOCK_M, BLOCK_N) of a row-major matrix, 0 outside."""
    offsets = offs_m[:, None].to(tl.int64) * stride + offs_n[None, :]
    return tl.load(sims_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(sims_ptr, stride, offs_m, offs_n, mask, value):
    """Writes (BLOCK_M, BLOCK_N) in the matrix's dtype."""
    offsets = offs_m[:, None].to(tl.int64) * stride + offs_n[None, :]
    tl.store(sims_ptr + offsets, value.to(sims_ptr.dtype.element_ty), mask=mask)


@triton.jit
def with_diagonal(s, diag_ptr, diag_offset, offs_m, offs_n, mask_m):
    """The tile with the exact values of its diagonal, if they are given."""
    if diag_ptr is not None:
        diag = tl.load(diag_ptr + offs_m, mask=mask_m, other=0.0)
        s = tl.where(offs_n[None, :] == (offs_m + diag_offset)[:, None], diag[:, None], s)
    return s


@triton.jit
def positives(row_ids_ptr, col_ids_ptr, diag_offset, offs_m, offs_n, mask_m, mask_n):
    """(BLOCK_M, BLOCK_N): which pairs are positive, by ids or by the diagonal."""
    if row_ids_ptr is not None:
        row_ids = tl.load(row_ids_ptr + offs_m, mask=mask_m, other=0)
        col_ids = tl.load(col_ids_ptr + offs_n, mask=mask_n, other=0)
        positive = row_ids[:, None] == col_ids[None, :]
    else:
        positive = offs_n[None, :] == (offs_m + diag_offset)[:, None]
    return positive


@triton.jit
def gumbel(key, position):
    """Standard Gumbel noise at `position` of the stream `key`; docs/ops.md, hard negatives."""
    u = ((draw(key, position) >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(u))


@triton.jit
def best_of(score, index, AXIS: tl.constexpr):
    """The largest score along an axis and its index, the lowest where several tie."""
    best = tl.max(score, AXIS)
    at_best = score == tl.expand_dims(best, AXIS)
    return best, tl.min(tl.where(at_best, index, NO_INDEX), AXIS)


@triton.jit
def merge_lse_kernel(
    max_ptr, sum_ptr, extra_ptr, part_ptr, P, X, unit,
    RESCALES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    offs_x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    mask_x = offs_x < X
    offs_p = tl.arange(0, BLOCK_P)
    plane = P.to(tl.int64) * X
    old_max = tl.load(max_ptr + offs_x, mask=mask_x, other=0.0)
    new_max = old_max
    for start in range(0, P, BLOCK_P):
        mask = (start + offs_p < P)[:, None] & mask_x[None, :]
        offsets = (start + offs_p)[:, None].to(tl.int64) * X + offs_x[None, :]
        part_max = tl.load(part_ptr + offsets, mask=mask, other=float("-inf"))
        new_max = tl.maximum(new_max, tl.max(part_max, 0) * unit)
    factor = tl.exp(old_max - new_max)
    total = tl.load(sum_ptr + offs_x, mask=mask_x, other=0.0) * factor
    extra = tl.load(extra_ptr + offs_x, mask=mask_x, other=0.0)
    if RESCALES:
        extra *= factor
    for start in range(0, P, BLOCK_P):
        mask = (start + offs_p < P)[:, None] & mask_x[None, :]
        offsets = (start + offs_p)[:, None].to(tl.int64) * X + offs_x[None, :]
        part_max = tl.load(part_ptr + offsets, mask=mask, other=float("-inf")) * unit
        part_sum = tl.load(part_ptr + plane + offsets, mask=mask, other=0.0)
        part_extra = tl.load(part_ptr + 2 * plane + offsets, mask=mask, other=0.0)
        factor_p = tl.exp(part_max - new_max[None, :])
        total += tl.sum(part_sum * factor_p, 0)
        extra += tl.sum(part_extra * factor_p if RESCALES else part_extra, 0)
    tl.store(max_ptr + offs_x, new_max, mask=mask_x)
    tl.store(sum_ptr + offs_x, total, mask=mask_x)
    tl.store(extra_ptr + offs_x, extra, mask=mask_x)


@triton.jit
def add_kernel(
    out_ptr, part_ptr, P, X, BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr
):  # fmt: skip
    offs_x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    mask_x = offs_x < X
    offs_p = tl.arange(0, BLOCK_P)
    total = tl.load(out_ptr + offs_x, mask=mask_x, other=0.0)
    for start in range(0, P, BLOCK_P):
        mask = (start + offs_p < P)[:, None] & mask_x[None, :]
        offsets = (start + offs_p)[:, None].to(tl.int64) * X + offs_x[None, :]
        total += tl.sum(tl.load(part_ptr + offsets, mask=mask, other=0.0), 0)
    tl.store(out_ptr + offs_x, total, mask=mask_x)


@triton.jit
def merge_best_kernel(
    best_ptr, index_ptr, old_best_ptr, old_index_ptr, part_ptr, part_index_ptr, P, X,
    K, rank, BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    # Rank 0 is the best of all; the next ranks take what comes after the one before them.
    offs_x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    mask_x = offs_x < X
    offs_p = tl.arange(0, BLOCK_P)
    entry = offs_x.to(tl.int64) * K
    last, last_index = last_winner(best_ptr, index_ptr, offs_x, mask_x, K, rank)
    best = tl.full((BLOCK_X,), float("-inf"), tl.float32)
    index = tl.full((BLOCK_X,), NO_INDEX, tl.int32)
    for r in range(0, K):
        score = tl.load(old_best_ptr + entry + r, mask=mask_x, other=float("-inf"))
        at = tl.load(old_index_ptr + entry + r, mask=mask_x, other=-1).to(tl.int32)
        better = (score > best) | ((score == best) & (at < index))
        better = better & comes_after(score, at, last, last_index)
        best, index = tl.where(better, score, best), tl.where(better, at, index)
    for start in range(0, P, BLOCK_P):
        mask = (start + offs_p < P)[:, None] & mask_x[None, :]
        offsets = (start + offs_p)[:, None].to(tl.int64) * X + offs_x[None, :]
        score = tl.load(part_ptr + offsets, mask=mask, other=float("-inf"))
        at = tl.load(part_index_ptr + offsets, mask=mask, other=NO_INDEX)
        score, at = best_of(score, at, 0)
        better = (score > best) | ((score == best) & (at < index))
        best, index = tl.where(better, score, best), tl.where(better, at, index)
    tl.store(best_ptr + entry + rank, best, mask=mask_x)
    found = tl.where(best == float("-inf"), -1, index)
    tl.store(index_ptr + entry + rank, found.to(tl.int64), mask=mask_x)


@triton.jit
def last_winner(best_ptr, index_ptr, offs, mask, K, rank):
    """Score and index of the winner before `rank`; before the first, what comes before all."""
    entry = offs.to(tl.int64) * K + rank - 1
    mask = mask & (rank > 0)
    last = tl.load(best_ptr + entry, mask=mask, other=float("inf"))
    return last, tl.load(index_ptr + entry, mask=mask, other=-1).to(tl.int32)


@triton.jit
def comes_after(score, index, last, last_index):
    """Whether a candidate comes after the last winner: by score, then by index."""
    return (score < last) | ((score == last) & (index > last_index))


def rows_per_program(M: int, N: int) -> int:
    """How many rows one program of a pass takes: a function of the shape alone, as sums are."""
    rows = _MOST_ROWS
    while rows > BLOCK_M and triton.cdiv(M, rows) * triton.cdiv(N, BLOCK_N) < _MANY_PROGRAMS:
        rows //= 2
    return rows


def partials(count: int, P: int, X: int, like: Tensor) -> Tensor:
    """Workspace (count, P, X), fp32: what P programs leave for X rows or columns."""
    return torch.empty(count, P, X, dtype=torch.float32, device=like.device)


def merge_lse(
    running_max: Tensor, running_sum: Tensor, extra: Tensor, partial: Tensor, *,
    rescales: bool, unit: float = 1.0,
) -> None:  # fmt: skip
    """Merges (3, P, X) maxima, sums and extra sums into the running ones (X,).

    The extra sum is relative to the maximum if it `rescales`. `unit` is what one of the partial
    maxima is worth, ln 2 if they are exponents of 2.
    """
    _, P, X = partial.shape
    merge_lse_kernel[(triton.cdiv(X, MERGE_BLOCKS["BLOCK_X"]),)](
        running_max, running_sum, extra, partial, P, X, unit,
        RESCALES=rescales, **MERGE_BLOCKS,
    )  # fmt: skip


def add(outputs: tuple[Tensor, ...], partial: Tensor) -> None:
    """Adds (count, P, X) partial sums to as many running ones (X,)."""
    _, P, X = partial.shape
    for out, part in zip(outputs, partial, strict=True):
        add_kernel[(triton.cdiv(X, MERGE_BLOCKS["BLOCK_X"]),)](out, part, P, X, **MERGE_BLOCKS)


def merge_best(
    best: Tensor, index: Tensor, old: tuple[Tensor, Tensor], partial: Tensor,
    partial_index: Tensor, rank: int,
) -> None:  # fmt: skip
    """Writes the winner of `rank` among the old (X, K) and P candidates (P, X) of each row."""
    P, X = partial.shape
    merge_best_kernel[(triton.cdiv(X, MERGE_BLOCKS["BLOCK_X"]),)](
        best, index, *old, partial, partial_index, P, X, best.shape[1], rank,
        **MERGE_BLOCKS,
    )  # fmt: skip
