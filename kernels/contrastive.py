"""Contrastive losses in Triton: passes over tiles of similarities, in place and without atomics.

vlpfast/ops/_contrastive_chunked.py drives them and says what each argument is. `sims` (M, N) are
raw similarities, fp32, bf16 or fp16, rows `sims.stride(0)` apart; `scale`, `bias` and `seed` are
0-d tensors on the device, so nothing waits for it. Vectors called running are read, merged with
the tile and written; two calls on the same tensors give the same bits.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vlpfast.kernels import _contrastive as shared
from vlpfast.kernels import _contrastive_fused as fused
from vlpfast.kernels import _contrastive_passes as passes
from vlpfast.kernels._common import AotCase
from vlpfast.kernels._contrastive import (
    BLOCK_M,
    BLOCK_N,
    NUM_WARPS,
    add,
    merge_best,
    merge_lse,
    partials,
    rows_per_program,
)  # fmt: skip
from vlpfast.kernels._contrastive_fused import contrastive_fused_stats

__all__ = [
    "AOT_CASES",
    "contrastive_fused_stats",
    "contrastive_grad",
    "contrastive_hinge",
    "contrastive_negatives",
    "contrastive_sigmoid",
    "contrastive_stats",
    "contrastive_teacher",
]

_BLOCKS = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": NUM_WARPS}


def _grid(sims: Tensor) -> tuple[int, tuple[int, int]]:
    """Rows a program takes, and the programs along columns and rows."""
    M, N = sims.shape
    rows = rows_per_program(M, N)
    return rows, (triton.cdiv(N, BLOCK_N), triton.cdiv(M, rows))


def _stride(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)


def contrastive_stats(
    sims: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    diag: Tensor | None,
    diag_offset: int,
    row_max: Tensor,
    row_sum: Tensor,
    row_pos: Tensor,
    col_max: Tensor | None,
    col_sum: Tensor | None,
    col_pos: Tensor | None,
) -> None:
    """Running log-sum-exp of z = scale * sims over rows and, if given, columns, from one read.

    row_max, row_sum (M,): the largest z_ij, and sum_j exp(z_ij - row_max_i).
    row_pos (M,): sum of the raw similarities of the row's positives. col_* (N,) likewise.
    """
    (M, N), (rows, grid) = sims.shape, _grid(sims)
    row_part = partials(3, grid[0], M, sims)
    col_part = None if col_max is None else partials(3, grid[1], N, sims)
    with torch.cuda.device_of(sims):
        passes.stats_kernel[grid](
            sims, scale, row_ids, col_ids, diag, row_part, col_part,
            M, N, sims.stride(0), diag_offset, rows, **_BLOCKS,
        )  # fmt: skip
        merge_lse(row_max, row_sum, row_pos, row_part, rescales=False)
        if col_part is not None:
            merge_lse(col_max, col_sum, col_pos, col_part, rescales=False)


def contrastive_teacher(
    sims: Tensor,
    teacher_sims: Tensor,
    scale: Tensor,
    diag: Tensor | None,
    diag_offset: int,
    row_max: Tensor,
    row_sum: Tensor,
    row_dot: Tensor,
) -> None:
    """Running statistics of the teacher's softmax over z = scale * teacher_sims.

    row_max, row_sum (M,): as in `contrastive_stats`; row_dot (M,): sum_j exp(z_ij - row_max_i) s_ij
    with the student's s.
    """
    (M, N), (rows, grid) = sims.shape, _grid(sims)
    row_part = partials(3, grid[0], M, sims)
    with torch.cuda.device_of(sims):
        passes.teacher_kernel[grid](
            sims, teacher_sims, scale, diag, row_part,
            M, N, sims.stride(0), teacher_sims.stride(0), diag_offset, rows, **_BLOCKS,
        )  # fmt: skip
        merge_lse(row_max, row_sum, row_dot, row_part, rescales=True)


def contrastive_grad(
    sims: Tensor,
    teacher_sims: Tensor | None,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    diag: Tensor | None,
    diag_offset: int,
    row_max: Tensor,
    row_sum: Tensor,
    col_max: Tensor | None,
    col_sum: Tensor | None,
    row_weight: Tensor,
    col_weight: Tensor | None,
    smoothing: float,
    teacher_max: Tensor | None,
    teacher_sum: Tensor | None,
    alpha: float,
    row_dot: Tensor,
) -> None:
    """Overwrites sims by g = dloss/dz, unnormalised; adds sum_j g_ij s_ij to row_dot (M,).

    g_ij = exp(z_ij - row_max_i) / row_sum_i + exp(z_ij - col_max_j) / col_sum_j - smoothing
           - positive_ij (row_weight_i + col_weight_j)
           - alpha exp(scale * teacher_sims_ij - teacher_max_i) / teacher_sum_i
    without the terms of what is None.
    """
    (M, N), (rows, grid) = sims.shape, _grid(sims)
    row_part = partials(1, grid[0], M, sims)
    with torch.cuda.device_of(sims):
        passes.grad_kernel[grid](
            sims, teacher_sims, scale, row_ids, col_ids, diag,
            row_max, row_sum, col_max, col_sum, row_weight, col_weight,
            teacher_max, teacher_sum, row_part,
            M, N, sims.stride(0), _stride(teacher_sims), diag_offset, rows, smoothing, alpha,
            **_BLOCKS,
        )  # fmt: skip
        add((row_dot,), row_part)


def contrastive_sigmoid(
    sims: Tensor,
    teacher_sims: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    diag: Tensor | None,
    diag_offset: int,
    positive: float,
    negative: float,
    alpha: float,
    write_grad: bool,
    row_loss: Tensor,
    col_loss: Tensor | None,
    row_dot: Tensor,
    row_grad: Tensor,
) -> None:
    """The sigmoid loss of a tile, and if `write_grad` its gradient over sims.

    z = scale * sims + bias;  t = (positive or negative) + alpha sigmoid(the z of teacher_sims)
    l = softplus(z) - t z;  g = sigmoid(z) - t;  added to: row_loss (M,) sum_j l, col_loss (N,) or
    None sum_i l, row_dot (M,) sum_j g s, row_grad (M,) sum_j g.
    """
    (M, N), (rows, grid) = sims.shape, _grid(sims)
    row_part = partials(3, grid[0], M, sims)
    col_part = None if col_loss is None else partials(1, grid[1], N, sims)
    with torch.cuda.device_of(sims):
        passes.sigmoid_kernel[grid](
            sims, teacher_sims, scale, bias, row_ids, col_ids, diag, row_part, col_part,
            M, N, sims.stride(0), _stride(teacher_sims), diag_offset, rows, positive, negative,
            alpha, WRITE_GRAD=write_grad, **_BLOCKS,
        )  # fmt: skip
        add((row_loss, row_dot, row_grad), row_part)
        if col_part is not None:
            add((col_loss,), col_part)


def contrastive_negatives(
    sims: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    first_row: int,
    row_offset: int,
    side: int,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    diag_offset: int,
    row_best: Tensor,
    row_index: Tensor,
    col_best: Tensor | None,
    col_index: Tensor | None,
) -> None:
    """Running k best negatives of each row and, if given, column by scale * s + Gumbel noise.

    row_best (M, k) fp32 and row_index (M, k) int64, best first, the lower index where two tie, -inf
    and -1 where none is left; col_* (N, k) likewise. Row i draws from stream 2 (first_row +
    row_offset + i) + side at position j, column j from stream 2 (first_row + j) + 1 - side at
    position row_offset + i, which is what is stored for it. Without `seed` there is no noise. One
    pass over the tile for each of the k.
    """
    (M, N), (rows, grid) = sims.shape, _grid(sims)
    row_old = (row_best.clone(), row_index.clone())
    row_part = partials(1, grid[0], M, sims)[0]
    row_at = torch.empty_like(row_part, dtype=torch.int32)
    col_part = col_at = None
    if col_best is not None:
        col_old = (col_best.clone(), col_index.clone())
        col_part = partials(1, grid[1], N, sims)[0]
        col_at = torch.empty_like(col_part, dtype=torch.int32)
    num_negatives = row_best.shape[1]
    with torch.cuda.device_of(sims):
        for rank in range(num_negatives):
            passes.negatives_kernel[grid](
                sims, scale, seed, row_ids, col_ids, row_best, row_index, col_best, col_index,
                row_part, row_at, col_part, col_at, M, N, sims.stride(0), diag_offset,
                first_row, row_offset, side, num_negatives, rank, rows, **_BLOCKS,
            )  # fmt: skip
            merge_best(row_best, row_index, row_old, row_part, row_at, rank)
            if col_part is not None:
                merge_best(col_best, col_index, col_old, col_part, col_at, rank)


def contrastive_hinge(
    sims: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    diag_offset: int,
    row_pair: Tensor,
    col_pair: Tensor,
    margin: float,
    row_loss: Tensor,
    row_count: Tensor,
    col_count: Tensor,
) -> None:
    """The summed hinges of a tile; overwrites sims by their derivative.

    Of pairs that are not positive: a = margin + s_ij - row_pair_i, b = margin + s_ij - col_pair_j;
    row_loss (M,) += sum_j max(a, 0) + max(b, 0); row_count (M,) += sum_j [a > 0]; col_count (N,) +=
    sum_i [b > 0]; g = [a > 0] + [b > 0].
    """
    (M, N), (rows, grid) = sims.shape, _grid(sims)
    row_part, col_part = partials(2, grid[0], M, sims), partials(1, grid[1], N, sims)
    with torch.cuda.device_of(sims):
        passes.hinge_kernel[grid](
            sims, row_ids, col_ids, row_pair, col_pair, row_part, col_part,
            M, N, sims.stride(0), diag_offset, rows, margin, **_BLOCKS,
        )  # fmt: skip
        add((row_loss, row_count), row_part)
        add((col_count,), col_part)


_FLOATS = ("smoothing", "alpha", "margin", "positive_target", "negative_target", "unit")
_ALIGNED = ("N", "D", "stride", "teacher_stride", "stride_x", "stride_y", "rows_per_program",
            "rows_per_group", "cols_per_group")  # fmt: skip


def _types(kernel: triton.JITFunction, dtype: str) -> dict[str, str]:
    """Types of a kernel's arguments, which follow from their names."""
    types = {}
    for name in kernel.arg_names:
        if name in ("sims_ptr", "teacher_ptr", "x_ptr", "y_ptr"):
            types[name] = f"*{dtype}"
        elif name.endswith("part_index_ptr"):
            types[name] = "*i32"
        elif name.endswith(("_ids_ptr", "index_ptr", "seed_ptr")):
            types[name] = "*i64"
        elif name.endswith("_ptr"):
            types[name] = "*fp32"
        else:
            types[name] = "fp32" if name in _FLOATS else "i32"
    return types


def _aot_case(
    name: str, kernel: triton.JITFunction, dtype: str, constants: dict, absent: str = "",
    **limits: object,
) -> AotCase:  # fmt: skip
    """A case; pointers whose name has one of the words in `absent` are None."""
    types = _types(kernel, dtype)
    none = [n for n in types if n.endswith("_ptr") and any(w in n for w in absent.split())]
    constants = constants | dict.fromkeys(none)
    types = {argument: kind for argument, kind in types.items() if argument not in constants}
    divisible = [argument for argument in _ALIGNED if argument in types]
    return AotCase(f"{name}-{dtype}", kernel, types, constants, divisible, **limits)


def _pass_case(
    name: str, kernel: triton.JITFunction, dtype: str, absent: str = "", max_registers: int = 128,
    **constants: object,
) -> AotCase:  # fmt: skip
    """A pass; with up to 128 registers two programs of 8 warps share a multiprocessor."""
    return _aot_case(
        f"contrastive_{name}", kernel, dtype,
        constants | {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}, absent,
        num_warps=NUM_WARPS, max_registers=max_registers, max_shared_bytes=16_384,
        instructions={90: ("LDG.E.128",)},
    )  # fmt: skip


def _fused_case(
    name: str, dtype: str, absent: str = "", M: int = 1024, even: bool = True
) -> AotCase:
    """The fused statistics; D is a run-time argument, so a case is for all multiples of 64."""
    blocks = fused.blocks_for(
        torch.float32 if dtype == "fp32" else torch.bfloat16, M,
        ids="_ids" not in absent, draws="seed" not in absent,
    )  # fmt: skip
    constants = {
        "EVEN_D": even, "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
        "BLOCK_M": blocks.m, "BLOCK_N": blocks.n, "BLOCK_D": blocks.d,
    }  # fmt: skip
    return _aot_case(
        f"contrastive_fused{name}", fused.fused_stats_kernel, dtype, constants, absent,
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
        instructions={80: ("HMMA",), 90: ("HGMMA",)},
    )  # fmt: skip


_NO_DRAWS = "seed best index"
AOT_CASES = [
    _pass_case("stats", passes.stats_kernel, "bf16", "_ids"),
    _pass_case("grad", passes.grad_kernel, "bf16", "_ids teacher"),
    _pass_case("sigmoid", passes.sigmoid_kernel, "bf16", "_ids teacher", WRITE_GRAD=True),
    _fused_case("-few-rows", "bf16", f"col_part tile {_NO_DRAWS}", M=64),
    _fused_case("-odd-D", "bf16", f"_ids {_NO_DRAWS}", even=False),
    _aot_case(
        "contrastive_merge_lse", shared.merge_lse_kernel, "fp32",
        {"RESCALES": True, **shared.MERGE_BLOCKS},
    ),
    _aot_case("contrastive_merge_best", shared.merge_best_kernel, "fp32", shared.MERGE_BLOCKS),
    _aot_case("contrastive_add", shared.add_kernel, "fp32", shared.MERGE_BLOCKS),
]  # fmt: skip
for _dtype in ("bf16", "fp32"):
    AOT_CASES += [
        _pass_case("stats-ids", passes.stats_kernel, _dtype),
        _pass_case("teacher", passes.teacher_kernel, _dtype),
        _pass_case("grad-ids-teacher", passes.grad_kernel, _dtype, "col_max col_sum col_weight"),
        _pass_case("sigmoid-full", passes.sigmoid_kernel, _dtype, WRITE_GRAD=True),
        _pass_case("negatives", passes.negatives_kernel, _dtype, max_registers=192),
        _pass_case("hinge", passes.hinge_kernel, _dtype),
        _fused_case("", _dtype, f"_ids {_NO_DRAWS}"),
        _fused_case("-ids", _dtype, _NO_DRAWS),
        _fused_case("-ids-draws", _dtype),
    ]
