"""Attention in Triton: ragged, many queries reading one key sequence, nothing padded or copied.

vlpfast/ops/_attention_op.py drives these functions. `_attention.py` has the plan and what kernels
share, `_attention_fwd.py` and `_attention_bwd.py` the kernels, `_attention_tiles.py` their tiles.

Letters: R query sequences, S key sequences, T_q and T_k tokens of the packed tensors.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vlpfast.kernels import _attention as shared
from vlpfast.kernels import _attention_bwd as bwd
from vlpfast.kernels import _attention_fwd as fwd
from vlpfast.kernels._attention import MAX_HEAD_DIM, AttentionPlan, make_plan
from vlpfast.kernels._attention_tiles import AOT_CASES, Blocks, block_e, blocks_for

__all__ = [
    "AOT_CASES",
    "MAX_HEAD_DIM",
    "AttentionPlan",
    "attention_bwd",
    "attention_fwd",
    "make_plan",
]

# Programs of the bias gradient that are wanted: four for each of 132 multiprocessors.
_MANY_PROGRAMS = 528


def _blocks(
    kernel: str, q: Tensor, most_rows: int, bias: Tensor | None, q_block: Tensor | None,
    seed: Tensor | None,
) -> Blocks:  # fmt: skip
    return blocks_for(
        kernel, q.dtype, q.shape[2], most_rows,
        extras=any(x is not None for x in (bias, q_block, seed)),
        hopper=not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] >= 9,
    )  # fmt: skip


def _constants(q: Tensor, causal: bool, blocks: Blocks) -> dict:
    _, H, E = q.shape
    return {
        "H": H, "E": E, "CAUSAL": causal,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "ieee",
        "BLOCK_M": blocks.m, "BLOCK_N": blocks.n, "BLOCK_E": block_e(E),
        "num_warps": blocks.num_warps, "num_stages": blocks.num_stages,
    }  # fmt: skip


def _check(q: Tensor) -> None:
    if q.shape[2] > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"attention: heads of up to {MAX_HEAD_DIM} in Triton, got {q.shape[2]}"
        )


def _numbers(bias: Tensor | None, scale: float, dropout_p: float) -> tuple:
    """Strides of the bias and the scalars, in the order of the kernels' arguments."""
    strides = (0, 0, 0, 0) if bias is None else bias.stride()
    strides = (0, *strides) if len(strides) == 3 else strides
    return *strides, scale, round(dropout_p * 2**24), 1 / (1 - dropout_p)


def _reads(kv_index: Tensor | None, plan: AttentionPlan) -> AttentionPlan:
    """The plan with None for what a call without `kv_index` does not have."""
    return plan if kv_index is not None else AttentionPlan(plan.covered, None, None, None, None)


def _tiles(plan: AttentionPlan, q_spans: Tensor, max_q: int, block_m: int) -> tuple[int, int]:
    """Programs a tile of the plan (or a query sequence) is dealt to, and programs in all."""
    if plan.tiles is not None:
        parts = triton.cdiv(shared.TILE, block_m)
        return parts, parts * plan.tiles.shape[0]
    parts = triton.cdiv(max_q, block_m)
    return parts, parts * q_spans.shape[0]


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_spans: Tensor,
    k_spans: Tensor,
    kv_index: Tensor | None,
    q_block: Tensor | None,
    k_block: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    dropout_p: float,
    scale: float,
    max_q: int,
    max_k: int,
    plan: AttentionPlan,
) -> tuple[Tensor, Tensor]:
    """Attention of `vlpfast.ops.attention` over packed tokens.

    fp32 products are three TF32 products each, with an error of at most 3 * 2**-22 of |q| |k| a
    term; others multiply in their dtype. Sums and the softmax are fp32.

    Args:
        q (T_q, H, E): fp32, bf16 or fp16, contiguous in E with any other strides.
        k (T_k, H, E), v (T_k, H, E): dtype of q, contiguous in E.
        q_spans (R, 2), k_spans (S, 2): int32, first row and length of each sequence, which do not
            overlap.
        kv_index (R,): int64, the key sequence each query sequence reads; None: r reads r.
        q_block (T_q,), k_block (T_k,): int, key visible iff its block <= the query's; or None.
        bias (H, M, N) or (R, H, M, N): float, any strides, added to the scores; or None.
        seed: 0-d int64 on the device, read where dropout_p > 0.
        causal: position in its sequence n <= m is visible.
        max_q, max_k: upper bounds of lengths, known to the host.
        plan: `make_plan` of these sequences.

    Returns:
        out (T_q, H, E), contiguous, zero for rows that see nothing or lie in no sequence.
        lse (T_q, H): fp32 natural log-sum-exp of the visible scores; -inf for those rows.
    """
    _check(q)
    T, H, E = q.shape
    out = torch.empty(T, H, E, dtype=q.dtype, device=q.device)
    lse = torch.empty(T, H, dtype=torch.float32, device=q.device)
    reads = _reads(kv_index, plan)
    seed = seed if dropout_p > 0 else None
    most_rows = max_q if kv_index is None else shared.TILE
    blocks = _blocks("fwd", q, most_rows, bias, q_block, seed)
    parts, programs = _tiles(reads, q_spans, max_q, blocks.m)
    with torch.cuda.device_of(q):
        shared.clear(plan.covered, out)
        shared.clear_lse(plan.covered, lse)
        if programs * H > 0:
            fwd.attention_fwd_kernel[(programs * H,)](
                q, k, v, q_spans, k_spans, q_block, k_block, bias, seed,
                reads.rows, reads.seqs, reads.tiles, out, lse, parts,
                *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
                *_numbers(bias, scale, dropout_p), **_constants(q, causal, blocks),
            )  # fmt: skip
    return out, lse


def attention_bwd(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_spans: Tensor,
    k_spans: Tensor,
    kv_index: Tensor | None,
    q_block: Tensor | None,
    k_block: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    dropout_p: float,
    scale: float,
    max_q: int,
    max_k: int,
    plan: AttentionPlan,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `attention_fwd`, contiguous, and of the bias if `bias_grad`, else None.

    Rows of k and v that nobody reads, or that lie in no sequence, have gradient 0. A shared bias
    (H, M, N) is summed over the query sequences in a fixed order.

    Args:
        grad_out (T_q, H, E): gradient of out.
        out, lse: results of `attention_fwd`; the others are its arguments.
    """
    _check(q)
    H = q.shape[1]
    grad_out = grad_out if grad_out.stride(2) == 1 else grad_out.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    reads = _reads(kv_index, plan)
    grouped, num_groups = kv_index is not None, k_spans.shape[0]
    seed = seed if dropout_p > 0 else None
    tensors = (q, k, v, q_spans, k_spans, q_block, k_block, bias, seed, reads.rows, reads.seqs)
    numbers = (
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad_out.stride()[:2],
        *_numbers(bias, scale, dropout_p),
    )  # fmt: skip
    most_rows = shared.TILE if grouped else max_q
    one = _blocks("bwd", q, most_rows, bias, q_block, seed)
    # Groups of more rows in the mean than a tile has are not tried in one pass.
    in_one = most_rows <= one.m or q.shape[0] <= one.m * num_groups
    small = one.m if in_one else -1
    with torch.cuda.device_of(q):
        shared.clear(plan.covered, dq)
        covered = plan.covered if k_spans is q_spans else shared.coverage(k_spans, k.shape[0])
        shared.clear(covered, dk, dv)
        if in_one and num_groups * H > 0:
            bwd.attention_bwd_kernel[(num_groups * H,)](
                *tensors, reads.group_start, out, lse, grad_out, dq, dk, dv,
                delta if bias_grad else None, *numbers, **_constants(q, causal, one),
            )  # fmt: skip
        if grouped or max_q > small:
            _two_kernels(
                tensors, reads, out, lse, grad_out, dq, dk, dv, delta, small, numbers, causal,
                max_q, max_k,
            )  # fmt: skip
        dbias = None
        if bias_grad:
            dbias = _bias_grad(tensors[:9], kv_index, lse, grad_out, delta, numbers, causal)
    return dq, dk, dv, dbias


def _two_kernels(
    tensors, reads, out, lse, grad_out, dq, dk, dv, delta, small, numbers, causal, max_q, max_k
) -> None:  # fmt: skip
    """dQ with delta, then dK and dV, of groups with more than `small` rows."""
    q, q_spans, k_spans = tensors[0], tensors[3], tensors[4]
    extras, H = (tensors[7], tensors[5], tensors[8]), q.shape[1]
    most_rows = max_q if reads.tiles is None else shared.TILE
    blocks = _blocks("dq", q, most_rows, *extras)
    parts, programs = _tiles(reads, q_spans, max_q, blocks.m)
    if programs * H > 0:
        bwd.attention_bwd_dq_kernel[(programs * H,)](
            *tensors, reads.tiles, out, lse, grad_out, dq, delta, parts, small, *numbers,
            **_constants(q, causal, blocks),
        )  # fmt: skip
    blocks = _blocks("dkdv", q, most_rows, *extras)
    parts = triton.cdiv(max_k, blocks.n)
    if k_spans.shape[0] * parts * H > 0:
        bwd.attention_bwd_dkdv_kernel[(k_spans.shape[0] * parts * H,)](
            *tensors, reads.group_start, lse, grad_out, delta, dk, dv, parts, small, *numbers,
            **_constants(q, causal, blocks),
        )  # fmt: skip


def _bias_grad(tensors, kv_index, lse, grad_out, delta, numbers, causal) -> Tensor:
    q, k, v, q_spans, k_spans, q_block, k_block, bias, seed = tensors
    R, (H, M, N) = q_spans.shape[0], bias.shape[-3:]
    blocks = _blocks("dbias", q, M, bias, q_block, seed)
    programs = H * triton.cdiv(M, blocks.m) * triton.cdiv(N, blocks.n)
    if R * programs == 0:
        return torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
    chunks = R
    if bias.dim() == 3:
        chunks = max(1, min(R, _MANY_PROGRAMS // programs))
    per_chunk = triton.cdiv(R, chunks)
    chunks = triton.cdiv(R, per_chunk)
    # What is summed over chunks is fp32; gradients of one sequence are written as they are.
    dtype = torch.float32 if bias.dim() == 3 else bias.dtype
    dbias = torch.empty(chunks, H, M, N, dtype=dtype, device=bias.device)
    bwd.attention_bwd_dbias_kernel[(chunks * programs,)](
        q, k, v, q_spans, k_spans, kv_index, q_block, k_block, bias, seed, lse, grad_out, delta,
        dbias, R, M, N, per_chunk, *numbers, **_constants(q, causal, blocks),
    )  # fmt: skip
    return dbias if bias.dim() == 4 else dbias.sum(0).to(bias.dtype)
