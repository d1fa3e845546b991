"""Attention in Triton, what forward and backward share: the plan, tiles, scores, dropout bits.

The rows of all query sequences that read one key sequence are a group; a program takes a tile of
rows of one group and one head, so keys read by many are loaded once for all of them. Without
`kv_index` a group is one query sequence, whose rows follow each other, and needs no plan.

Letters: R query sequences, S key sequences, T tokens of a packed tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from vlpfast.kernels._common import draw, stream_key

MAX_HEAD_DIM = 128
# Rows of a plan's tile: captions that read one image have 52 rows in the mean, 90 % at most 73
# (4 uses of captions of 13 tokens). Kernels take a tile in one piece or in two to four.
TILE = 64
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_FILL_ROWS, _FILL_COLS = 64, 128


class AttentionPlan(NamedTuple):
    """Which rows of q read which keys; on the device, the same for all layers and the backward.

    A place counts rows in the order of their groups. All but `covered` are empty without kv_index.

    Attributes:
        covered (T,): uint8, 1 where a row of q lies in a sequence.
        rows (T,): int32, row of q at each place.
        seqs (T,): int32, its query sequence.
        group_start (S + 1,): int32, place where each group begins.
        tiles (num_tiles, 4): int32, for each tile its group, its first place, and the places where
            the group begins and ends. There are as many as T and S allow; those left over are
            empty, (S, place >= 0, 0, 0).
    """

    covered: Tensor
    rows: Tensor
    seqs: Tensor
    group_start: Tensor
    tiles: Tensor


def make_plan(
    q_spans: Tensor, num_keys: int, kv_index: Tensor | None, num_rows: int
) -> AttentionPlan:
    """The plan of attention calls with these sequences; nothing waits for the device.

    Args:
        q_spans (R, 2): int32, first row and length of each query sequence; they do not overlap.
        num_keys: number S of key sequences.
        kv_index (R,): int64, the key sequence each query sequence reads, or None (r reads r).
        num_rows: rows T of q.
    """
    covered = coverage(q_spans, num_rows)
    if kv_index is None:
        none = q_spans.new_empty(0)
        return AttentionPlan(covered, none, none, none, none)
    device, i32 = q_spans.device, torch.int32
    order = kv_index.argsort(stable=True)
    first, lens = q_spans.index_select(0, order).unbind(1)
    # One sequence more than there are, for places beyond the last row: nothing reads them.
    starts = pad(lens.cumsum(0, dtype=i32), (1, 0))
    place = torch.arange(num_rows, dtype=i32, device=device)
    slot = torch.searchsorted(starts[1:], place, right=True)
    rows = place + pad(first - starts[:-1], (0, 1))[slot]
    seqs = pad(order.to(i32), (0, 1))[slot]
    key = torch.arange(num_keys + 1, device=device)
    group_start = starts[torch.searchsorted(kv_index[order], key)]

    begin, counts = group_start[:-1], group_start.diff()
    tile_starts = pad(((counts + TILE - 1) // TILE).cumsum(0, dtype=i32), (1, 0))
    num_groups = min(num_keys, num_rows, kv_index.shape[0])
    most = (num_rows + num_groups * (TILE - 1)) // TILE
    tile = torch.arange(most, dtype=i32, device=device)
    group = torch.searchsorted(tile_starts[1:], tile, right=True)
    begin, end = pad(begin, (0, 1))[group], pad(begin + counts, (0, 1))[group]
    tiles = torch.stack([group.to(i32), begin + (tile - tile_starts[group]) * TILE, begin, end], 1)
    return AttentionPlan(covered, rows, seqs, group_start, tiles)


def coverage(spans: Tensor, num_rows: int) -> Tensor:
    """(num_rows,) uint8: 1 where a row lies in one of the spans."""
    covered = torch.zeros(num_rows, dtype=torch.uint8, device=spans.device)
    if spans.shape[0] > 0:
        _mark_kernel[(spans.shape[0],)](spans, covered, BLOCK=128, num_warps=1)
    return covered


def clear(covered: Tensor, *outputs: Tensor) -> None:
    """Zeroes the rows that no span covers, of one or two (T, ...) contiguous tensors."""
    if covered.shape[0] > 0:
        one, two = outputs if len(outputs) == 2 else (outputs[0], None)
        _clear_kernel[(triton.cdiv(covered.shape[0], _FILL_ROWS),)](
            covered, one, two, covered.shape[0], one[0].numel(),
            BLOCK_M=_FILL_ROWS, BLOCK_W=_FILL_COLS,
        )  # fmt: skip


def clear_lse(covered: Tensor, lse: Tensor) -> None:
    """Writes -inf to the rows of lse (T, H) that no span covers."""
    if covered.shape[0] > 0:
        _clear_kernel[(triton.cdiv(covered.shape[0], _FILL_ROWS),)](
            covered, lse, None, covered.shape[0], lse.shape[1], VALUE=float("-inf"),
            BLOCK_M=_FILL_ROWS, BLOCK_W=16,
        )  # fmt: skip


@triton.jit
def _mark_kernel(spans_ptr, covered_ptr, BLOCK: tl.constexpr):
    pid_s = tl.program_id(0).to(tl.int64)
    first = tl.load(spans_ptr + 2 * pid_s).to(tl.int64)
    length = tl.load(spans_ptr + 2 * pid_s + 1)
    for start in range(0, length, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        tl.store(covered_ptr + first + offs, 1, mask=offs < length)


@triton.jit(do_not_specialize=["T"])
def _clear_kernel(
    covered_ptr, one_ptr, two_ptr, T, width, VALUE: tl.constexpr = 0.0,
    BLOCK_M: tl.constexpr = 64, BLOCK_W: tl.constexpr = 128,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    bare = tl.load(covered_ptr + offs_m, mask=offs_m < T, other=1) == 0
    if tl.max(bare.to(tl.int32), 0) > 0:
        for start in range(0, width, BLOCK_W):
            offs_w = start + tl.arange(0, BLOCK_W)
            at = offs_m[:, None] * width + offs_w[None, :]
            mask = bare[:, None] & (offs_w < width)[None, :]
            value = tl.full((BLOCK_M, BLOCK_W), VALUE, tl.float32)
            tl.store(one_ptr + at, value.to(one_ptr.dtype.element_ty), mask=mask)
            if two_ptr is not None:
                tl.store(two_ptr + at, value.to(two_ptr.dtype.element_ty), mask=mask)


@triton.jit
def tile_of(tiles_ptr, q_spans_ptr, tile, parts, BLOCK_M: tl.constexpr):
    """(key sequence, first place of the tile, places where its group begins and ends).

    A tile of the plan, or a query sequence, is taken by `parts` programs. Without a plan places
    count the rows of the sequence.
    """
    entry = (tile // parts).to(tl.int64)
    offset = (tile % parts) * BLOCK_M
    if tiles_ptr is not None:
        tiles_ptr += 4 * entry
        group, first = tl.load(tiles_ptr), tl.load(tiles_ptr + 1)
        begin, end = tl.load(tiles_ptr + 2), tl.load(tiles_ptr + 3)
    else:
        group, begin, first = entry.to(tl.int32), 0, 0
        end = tl.load(q_spans_ptr + 2 * entry + 1)
    return group, first + offset, begin, end


@triton.jit
def rows_at(rows_ptr, seqs_ptr, q_spans_ptr, group, place, mask):
    """int64 rows of q at the places of a group; their sequences and positions in them."""
    if rows_ptr is not None:
        rows = tl.load(rows_ptr + place, mask=mask, other=0)
        seqs = tl.load(seqs_ptr + place, mask=mask, other=0)
        positions = rows - tl.load(q_spans_ptr + 2 * seqs, mask=mask, other=0)
    else:
        rows = tl.load(q_spans_ptr + 2 * group) + place
        seqs = tl.zeros_like(place) + group
        positions = place
    return rows.to(tl.int64), seqs, positions


@triton.jit
def load_tile(ptr, rows, mask, stride, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """(rows, BLOCK_E) of a head; zero where masked and beyond E."""
    offs_e = tl.arange(0, BLOCK_E)
    at = ptr + rows[:, None] * stride + offs_e[None, :]
    if E == BLOCK_E:
        return tl.load(at, mask=mask[:, None], other=0.0)
    else:
        return tl.load(at, mask=mask[:, None] & (offs_e < E)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, rows, mask, stride, value, E: tl.constexpr, BLOCK_E: tl.constexpr):
    offs_e = tl.arange(0, BLOCK_E)
    at = ptr + rows[:, None] * stride + offs_e[None, :]
    mask = mask[:, None]
    if E != BLOCK_E:
        mask = mask & (offs_e < E)[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def bias_rows(bias_ptr, seqs, head, positions, stride_br, stride_bh, stride_bm):
    """Pointers to the first bias of each row."""
    if bias_ptr is None:
        return positions
    else:
        at = seqs.to(tl.int64) * stride_br + positions.to(tl.int64) * stride_bm
        return bias_ptr + tl.cast(head, tl.int64) * stride_bh + at


@triton.jit
def block_ids(block_ptr, rows, mask):
    if block_ptr is None:
        return rows
    else:
        return tl.load(block_ptr + rows, mask=mask, other=0)


@triton.jit
def dropout_keys(seed_ptr, seqs, head, positions):
    """uint32 key of each row's dropout bits, which ops/reference/attention.py defines."""
    if seed_ptr is None:
        return positions
    else:
        key = stream_key(tl.load(seed_ptr), seqs.to(tl.int64))
        return draw(draw(key, tl.zeros_like(seqs) + head), positions)


@triton.jit
def kept(keys, offs_n, threshold):
    """Whether a weight is kept, of 2-D keys and key positions that broadcast."""
    return (draw(keys, offs_n) >> 8) >= threshold


@triton.jit
def shown(
    s, positions, mask_m, offs_n, mask_n, bias_at, stride_bn, q_block, k_block,
    HAS_BIAS: tl.constexpr, HAS_BLOCKS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Scores in units of log2, with their bias, -inf where the key is absent or hidden.

    All are 2-D and broadcast, rows along either axis; bias pointers and block ids are read where a
    call has them. (A jit function cannot return None, so each has a value in any case.)
    """
    # An addition, because with the scale before it, it is one fused instruction.
    s += tl.where(mask_n, 0.0, float("-inf"))
    if HAS_BIAS:
        bias = tl.load(bias_at + offs_n * stride_bn, mask=mask_m & mask_n, other=0.0)
        s += bias.to(tl.float32) * LOG2E
    if CAUSAL:
        s = tl.where(offs_n <= positions, s, float("-inf"))
    if HAS_BLOCKS:
        s = tl.where(k_block <= q_block, s, float("-inf"))
    return s
