"""Shared by the elementwise kernels of a block: dropout by counter, and rows split into blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from vlpfast.kernels._common import draw, stream_key

# Widest row that one program holds: 32 registers a thread and buffer at 16 warps.
MAX_COLUMNS = 16384
# Programs of a backward pass: enough to fill 132 SMs twice, few enough that their partial sums,
# which are added in a second pass, stay small.
_BLOCKS = 256


@triton.jit
def dropped(x, row, offs, seed_ptr, threshold, scale):
    """x where its 24 random bits reach `threshold`, times `scale`; else 0."""
    bits = draw(stream_key(tl.load(seed_ptr), row), offs) >> 8
    return tl.where(bits >= threshold, x * scale, 0.0)


def dropout_scalars(dropout_p: float) -> tuple[int, float]:
    """Threshold on 24 random bits, and the scale of what is kept."""
    return round(dropout_p * 2**24), 1 / (1 - dropout_p)


def row_blocks(num_rows: int) -> tuple[int, int]:
    """(number of blocks, rows in each), by the number of rows alone."""
    rows = max(1, triton.cdiv(num_rows, _BLOCKS))
    return triton.cdiv(num_rows, rows), rows


def block_and_warps(columns: int) -> tuple[int, int]:
    """Columns a program holds, and its warps.

    Raises:
        ValueError: a row is too wide.
    """
    if columns > MAX_COLUMNS:
        raise ValueError(f"rows of up to {MAX_COLUMNS} columns, got {columns}")
    block = triton.next_power_of_2(columns)
    return block, max(1, min(16, block // 256))
