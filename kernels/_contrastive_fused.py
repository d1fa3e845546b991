"""Statistics of the contrastive losses straight from features: no similarity is ever stored.

One tile of inner products gives row and column sums and, if wanted, the hard negatives of both
directions. A program owns a rectangle of tiles: rows are finished in registers, columns in the
program's own line of a workspace, so there are no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.kernels._common import stream_key
from vlpfast.kernels._contrastive import (
    MASKED,
    TINY,
    best_of,
    gumbel,
    merge_best,
    merge_lse,
    partials,
    positives,
)

LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = 0.6931471805599453

# 32 x 32 programs, more along one side where the other has fewer tiles: enough for 132
# multiprocessors to end together. The workspace is 384 bytes a row and a column (640 with draws),
# 101 MB at 131,072 pairs.
_GROUPS, _MANY_PROGRAMS = 32, 1024


class Blocks(NamedTuple):
    """Tile of one program, and how it is compiled."""

    m: int
    n: int
    d: int
    num_warps: int
    num_stages: int


def blocks_for(dtype: torch.dtype, M: int, *, ids: bool, draws: bool) -> Blocks:
    """The largest tiles that spill neither on sm_80 nor on sm_90 (AOT_CASES of contrastive.py).

    No GPU has timed them. Row blocks of 64 are what a warp group multiplies at least.
    """
    if dtype == torch.float32:
        return Blocks(64, 32, 32, 4, 2) if draws else Blocks(64, 64, 16, 8, 2)
    if draws or M <= 64:
        return Blocks(64, 64, 64, 8, 3)
    return Blocks(128, 64 if ids else 128, 64, 8, 3)


def _groups(tiles_m: int, tiles_n: int) -> tuple[int, int]:
    """Into how many groups rows and columns are dealt: a function of the shape alone."""
    groups_m = min(tiles_m, max(_GROUPS, _MANY_PROGRAMS // min(tiles_n, _GROUPS)))
    return groups_m, min(tiles_n, max(_GROUPS, _MANY_PROGRAMS // groups_m))


@triton.jit
def _similarity(
    x_ptr, y_ptr, offs_m, offs_n, M, N, D, stride_x, stride_y,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """fp32 <x_m, y_n>; what lies beyond the last row repeats it, for the caller to mask."""
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)
    cols = tl.minimum(offs_n, N - 1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + rows[:, None] * stride_x + offs_d[None, :]
    y_ptrs = y_ptr + cols[None, :] * stride_y + offs_d[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # D is no constexpr: a loop of known length is unrolled, and its addresses take the registers.
    for d in range(0, D, BLOCK_D):
        if EVEN_D:
            x = tl.load(x_ptrs + d)
            y = tl.load(y_ptrs + d)
        else:
            x = tl.load(x_ptrs + d, mask=d + offs_d[None, :] < D, other=0.0)
            y = tl.load(y_ptrs + d, mask=d + offs_d[:, None] < D, other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["diag_offset", "first_row", "row_offset", "first_col", "side"])
def fused_stats_kernel(
    x_ptr, y_ptr, scale_ptr, seed_ptr, row_ids_ptr, col_ids_ptr,
    row_part_ptr, col_part_ptr, row_part_best_ptr, row_part_index_ptr,
    col_part_best_ptr, col_part_index_ptr, tile_ptr, tile_part_index_ptr,
    M, N, D, stride_x, stride_y, diag_offset, first_row, row_offset, first_col, num_local, side,
    rows_per_group, cols_per_group, groups_m, groups_n,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share rows and columns, which stay in the L2 cache.
    pid = tl.program_id(0)
    group_m, group_n = tl.swizzle2d(pid // groups_n, pid % groups_n, groups_m, groups_n, 16)
    begin_m, begin_n = group_m * rows_per_group, group_n * cols_per_group
    end_m = tl.minimum(begin_m + rows_per_group, M)
    end_n = tl.minimum(begin_n + cols_per_group, N)
    row_line, row_plane = group_n.to(tl.int64) * M, groups_n.to(tl.int64) * M
    col_line, col_plane = group_m.to(tl.int64) * N, groups_m.to(tl.int64) * N
    offs_b = tl.arange(0, BLOCK_N)
    if col_part_ptr is not None:
        tile_ptr += pid * 4 * BLOCK_N
    # exp2 throughout: log2(e) is part of the scale, the merge multiplies maxima by ln 2.
    scale = tl.load(scale_ptr)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        if col_part_ptr is not None:
            tile_part_index_ptr += pid * BLOCK_N

    for start_m in range(begin_m, end_m, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        m_i = tl.full((BLOCK_M,), MASKED, tl.float32)
        l_i = tl.zeros((BLOCK_M,), tl.float32)
        pos_i = tl.zeros((BLOCK_M,), tl.float32)
        if seed_ptr is not None:
            row_key = stream_key(seed, 2 * (first_row + row_offset + offs_m).to(tl.int64) + side)
            row_best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            row_index = tl.full((BLOCK_M,), -1, tl.int32)
        for start_n in range(begin_n, end_n, BLOCK_N):
            offs_n = start_n + offs_b
            mask_n = offs_n < N
            s = _similarity(
                x_ptr, y_ptr, offs_m, offs_n, M, N, D, stride_x, stride_y,
                EVEN_D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            crosses = (start_n < start_m + BLOCK_M + diag_offset) & (
                start_n + BLOCK_N > start_m + diag_offset
            )
            if row_ids_ptr is not None:
                crosses = True
            if crosses:
                positive = positives(
                    row_ids_ptr, col_ids_ptr, diag_offset, offs_m, offs_n, mask_m, mask_n
                )
                s_pos = tl.where(positive & mask_m[:, None] & mask_n[None, :], s, 0.0)
                pos_i += tl.sum(s_pos, 1)
                if col_part_ptr is not None:
                    tl.store(tile_ptr + 2 * BLOCK_N + offs_b, tl.sum(s_pos, 0))
            elif col_part_ptr is not None:
                tl.store(tile_ptr + 2 * BLOCK_N + offs_b, tl.zeros((BLOCK_N,), tl.float32))

            local_n = offs_n - first_col
            has_local = (start_n < first_col + num_local) & (start_n + BLOCK_N > first_col)
            # Nested: one is known when compiling, the other is not.
            if seed_ptr is not None:  # noqa: SIM102
                if has_local:
                    positive = positives(
                        row_ids_ptr, col_ids_ptr, diag_offset, offs_m, offs_n, mask_m, mask_n
                    )
                    mask_local = mask_n & (local_n >= 0) & (local_n < num_local)
                    keep = mask_m[:, None] & mask_local[None, :] & (positive == 0)
                    score = s * scale + gumbel(row_key[:, None], local_n[None, :])
                    score = tl.where(keep, score, float("-inf"))
                    best, index = best_of(
                        score, tl.broadcast_to(local_n[None, :], (BLOCK_M, BLOCK_N)), 1
                    )
                    better = best > row_best
                    row_best = tl.where(better, best, row_best)
                    row_index = tl.where(better, index, row_index)
                    if col_part_ptr is not None:
                        col_key = stream_key(
                            seed, 2 * (first_row + local_n).to(tl.int64) + 1 - side
                        )
                        positions = row_offset + offs_m
                        score = s * scale + gumbel(col_key[None, :], positions[:, None])
                        score = tl.where(keep, score, float("-inf"))
                        best, index = best_of(
                            score, tl.broadcast_to(positions[:, None], (BLOCK_M, BLOCK_N)), 0
                        )
                        tl.store(tile_ptr + 3 * BLOCK_N + offs_b, best)
                        tl.store(tile_part_index_ptr + offs_b, index)

            z = s * (scale * LOG2E)

            # One exponential for row and column, relative to the largest of the tile.
            top = tl.max(tl.max(z, 1), 0)
            p = tl.exp2(z - top)
            t_m, t_l = tl.zeros((BLOCK_M,), tl.float32) + top, tl.sum(p, 1)
            low = tl.min(t_l, 0)
            # Columns change hands through memory: a tile's result is spread over all warps, and
            # merging it there would keep each of its values 32 times in registers.
            if col_part_ptr is not None:
                t_k = tl.sum(p, 0)
                low = tl.minimum(low, tl.min(t_k, 0))
                tl.store(tile_ptr + offs_b, tl.zeros((BLOCK_N,), tl.float32) + top)
                tl.store(tile_ptr + BLOCK_N + offs_b, t_k)
            if (low < TINY) | (start_m + BLOCK_M > M) | (start_n + BLOCK_N > N):
                # A maximum for each row and column: at the edges, and where a sum got too small.
                # In two steps: one of both would need a tile's registers more.
                z += tl.where(mask_m, 0.0, MASKED)[:, None]
                z += tl.where(mask_n, 0.0, MASKED)[None, :]
                t_m = tl.max(z, 1)
                t_l = tl.sum(tl.exp2(z - t_m[:, None]), 1)
                if col_part_ptr is not None:
                    t_n = tl.max(z, 0)
                    tl.debug_barrier()
                    tl.store(tile_ptr + offs_b, t_n)
                    tl.store(tile_ptr + BLOCK_N + offs_b, tl.sum(tl.exp2(z - t_n[None, :]), 0))
            m_new = tl.maximum(m_i, t_m)
            l_i = l_i * tl.exp2(m_i - m_new) + t_l * tl.exp2(t_m - m_new)
            m_i = m_new

            if col_part_ptr is not None:
                # What one row block leaves in the program's line, the next finds.
                tl.debug_barrier()
                later = mask_n & (start_m > begin_m)
                line = col_part_ptr + col_line + offs_n
                t_n, t_k = tl.load(tile_ptr + offs_b), tl.load(tile_ptr + BLOCK_N + offs_b)
                t_pos = tl.load(tile_ptr + 2 * BLOCK_N + offs_b)
                n_i = tl.load(line, mask=later, other=MASKED)
                k_i = tl.load(line + col_plane, mask=later, other=0.0)
                t_pos += tl.load(line + 2 * col_plane, mask=later, other=0.0)
                n_new = tl.maximum(n_i, t_n)
                k_i = k_i * tl.exp2(n_i - n_new) + t_k * tl.exp2(t_n - n_new)
                tl.store(line, n_new, mask=mask_n)
                tl.store(line + col_plane, k_i, mask=mask_n)
                tl.store(line + 2 * col_plane, t_pos, mask=mask_n)
                if seed_ptr is not None:
                    at = col_line + offs_n
                    best = tl.load(col_part_best_ptr + at, mask=later, other=float("-inf"))
                    index = tl.load(col_part_index_ptr + at, mask=later, other=-1)
                    if has_local:
                        t_best = tl.load(tile_ptr + 3 * BLOCK_N + offs_b)
                        t_index = tl.load(tile_part_index_ptr + offs_b)
                        better = t_best > best
                        best = tl.where(better, t_best, best)
                        index = tl.where(better, t_index, index)
                    tl.store(col_part_best_ptr + at, best, mask=mask_n)
                    tl.store(col_part_index_ptr + at, index, mask=mask_n)
                tl.debug_barrier()
        line = row_part_ptr + row_line + offs_m
        tl.store(line, m_i, mask=mask_m)
        tl.store(line + row_plane, l_i, mask=mask_m)
        tl.store(line + 2 * row_plane, pos_i, mask=mask_m)
        if seed_ptr is not None:
            tl.store(row_part_best_ptr + row_line + offs_m, row_best, mask=mask_m)
            tl.store(row_part_index_ptr + row_line + offs_m, row_index, mask=mask_m)


def contrastive_fused_stats(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    diag_offset: int,
    row_max: Tensor,
    row_sum: Tensor,
    row_pos: Tensor,
    col_max: Tensor | None,
    col_sum: Tensor | None,
    col_pos: Tensor | None,
    *,
    seed: Tensor | None = None,
    first_row: int = 0,
    row_offset: int = 0,
    first_col: int = 0,
    num_local: int | None = None,
    side: int = 0,
    row_best: Tensor | None = None,
    row_index: Tensor | None = None,
    col_best: Tensor | None = None,
    col_index: Tensor | None = None,
) -> None:
    """What `contrastive_stats` and `contrastive_negatives` (k = 1) find in x y^T, never stored.

    One matrix product; similarities are fp32, also of bf16 and fp16 features, where a stored tile
    rounds them. fp32 features are multiplied as three TF32 products each (an error near fp32's; one
    TF32 product would be wrong by 2**-11 times the scale).

    Args:
        x (M, D), y (N, D): features of one dtype.
        scale .. col_pos: as in `contrastive_stats`.
        seed: 0-d int64, draws one negative for each row, and for each column if col_* are given.
        first_row, row_offset, side: as in `contrastive_negatives`.
        first_col, num_local: columns first_col .. first_col + num_local - 1 of y are this rank's:
            only they compete, and they are counted from 0. By default all are.
        row_best (M, 1), row_index (M, 1), col_best (N, 1), col_index (N, 1): running winners.
    """
    (M, D), N = x.shape, y.shape[0]
    x, y = (a if a.stride(1) == 1 else a.contiguous() for a in (x, y))
    num_local = N if num_local is None else num_local
    draws, with_cols = seed is not None, col_max is not None
    if draws and row_best.shape[1] != 1:
        raise NotImplementedError(f"fused statistics draw one negative, got k={row_best.shape[1]}")
    blocks = blocks_for(x.dtype, M, ids=row_ids is not None, draws=draws)
    tiles_m, tiles_n = triton.cdiv(M, blocks.m), triton.cdiv(N, blocks.n)
    groups_m, groups_n = _groups(tiles_m, tiles_n)
    tiles_per_m, tiles_per_n = triton.cdiv(tiles_m, groups_m), triton.cdiv(tiles_n, groups_n)
    groups_m, groups_n = triton.cdiv(tiles_m, tiles_per_m), triton.cdiv(tiles_n, tiles_per_n)

    row_part = partials(3, groups_n, M, x)
    col_part = partials(3, groups_m, N, x) if with_cols else None
    tile = partials(4, groups_m * groups_n, blocks.n, x) if with_cols else None
    row_draw = _draw_workspace(groups_n, M, x) if draws else (None, None)
    col_draw = _draw_workspace(groups_m, N, x) if draws and with_cols else (None, None)
    tile_index = torch.empty_like(tile[0], dtype=torch.int32) if draws and with_cols else None
    with torch.cuda.device_of(x):
        fused_stats_kernel[(groups_m * groups_n,)](
            x, y, scale, seed, row_ids, col_ids, row_part, col_part, *row_draw, *col_draw,
            tile, tile_index, M, N, D, x.stride(0), y.stride(0), diag_offset,
            first_row, row_offset, first_col, num_local, side,
            tiles_per_m * blocks.m, tiles_per_n * blocks.n, groups_m, groups_n,
            EVEN_D=D % blocks.d == 0,
            PRECISION="tf32x3" if x.dtype == torch.float32 else "ieee",
            BLOCK_M=blocks.m, BLOCK_N=blocks.n, BLOCK_D=blocks.d,
            num_warps=blocks.num_warps, num_stages=blocks.num_stages,
        )  # fmt: skip
        merge_lse(row_max, row_sum, row_pos, row_part, rescales=False, unit=_LN2)
        if with_cols:
            merge_lse(col_max, col_sum, col_pos, col_part, rescales=False, unit=_LN2)
        if draws:
            old = (row_best.clone(), row_index.clone())
            merge_best(row_best, row_index, old, *row_draw, 0)
        if draws and with_cols:
            old = (col_best.clone(), col_index.clone())
            merge_best(col_best, col_index, old, *col_draw, 0)


def _draw_workspace(P: int, X: int, like: Tensor) -> tuple[Tensor, Tensor]:
    best = partials(1, P, X, like)[0]
    return best, torch.empty_like(best, dtype=torch.int32)
