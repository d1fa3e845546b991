"""Attention backward in Triton: no atomics, so two calls on the same tensors give the same bits.

    P = exp(S - lse);  dP = keep / (1 - p) (dO V^T);  dS = P (dP - delta);  delta = rowsum(dO O)
    dV = (keep / (1 - p) P)^T dO;  dQ = scale dS K;  dK = scale dS^T Q;  dbias = dS

A group of up to BLOCK_M rows is one program of `attention_bwd_kernel` a head, which reads and
writes everything once. The other groups are left to `_dq_kernel` and then `_dkdv_kernel`. All but
dQ multiply transposed scores, keys along the first axis: a tile of 64 keys fills a warp group's
product however few rows there are, and P^T, dS^T are left operands from registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlpfast.kernels._attention import (
    LOG2E,
    bias_rows,
    block_ids,
    dropout_keys,
    kept,
    load_tile,
    rows_at,
    shown,
    store_tile,
    tile_of,
)


@triton.jit
def _load_lse(lse_ptr, rows, mask, H, head):
    """lse in units of log2, inf for rows that see nothing: their weights become zero."""
    lse = tl.load(lse_ptr + rows * H + head, mask=mask, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def _weights_and_grads(
    k, v, q, grad, lse, delta, scale, positions, mask_m, offs_n, mask_n, bias_at, stride_bn,
    q_block, k_block, row_keys, threshold, keep_scale,
    HAS_BIAS: tl.constexpr, HAS_BLOCKS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Transposed tiles (keys, rows): P with dropout, and dS."""
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
    s = shown(
        s, positions[None, :], mask_m[None, :], offs_n[:, None], mask_n[:, None],
        bias_at[None, :], stride_bn,
        q_block[None, :], k_block[:, None],
        HAS_BIAS, HAS_BLOCKS, CAUSAL,
    )  # fmt: skip
    p = tl.exp2(s - lse[None, :])
    dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    weights = p
    if HAS_DROPOUT:
        keep = kept(row_keys[None, :], offs_n[:, None], threshold)
        weights = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return weights, p * (dp - delta[None, :])


@triton.jit(do_not_specialize=["threshold"])
def attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, q_spans_ptr, k_spans_ptr, q_block_ptr, k_block_ptr, bias_ptr, seed_ptr,
    rows_ptr, seqs_ptr, group_start_ptr, out_ptr, lse_ptr, grad_ptr,
    dq_ptr, dk_ptr, dv_ptr, delta_ptr,
    stride_qm, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gm, stride_gh,
    stride_br, stride_bh, stride_bm, stride_bn, scale, threshold, keep_scale,
    H: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head, group = pid % H, pid // H
    if group_start_ptr is not None:
        begin, end = tl.load(group_start_ptr + group), tl.load(group_start_ptr + group + 1)
    else:
        begin, end = 0, tl.load(q_spans_ptr + 2 * group + 1)
    if end - begin > BLOCK_M:
        return
    place = begin + tl.arange(0, BLOCK_M)
    mask_m = place < end
    rows, seqs, positions = rows_at(rows_ptr, seqs_ptr, q_spans_ptr, group, place, mask_m)
    k_first = tl.load(k_spans_ptr + 2 * group).to(tl.int64)
    k_len = tl.load(k_spans_ptr + 2 * group + 1)
    bias_at = bias_rows(bias_ptr, seqs, head, positions, stride_br, stride_bh, stride_bm)
    q_block = block_ids(q_block_ptr, rows, mask_m)
    row_keys = dropout_keys(seed_ptr, seqs, head, positions)

    q = load_tile(q_ptr + head * stride_qh, rows, mask_m, stride_qm, E, BLOCK_E)
    grad = load_tile(grad_ptr + head * stride_gh, rows, mask_m, stride_gm, E, BLOCK_E)
    out = load_tile(out_ptr + head * E, rows, mask_m, H * E, E, BLOCK_E)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    lse = _load_lse(lse_ptr, rows, mask_m, H, head)
    k_ptr += k_first * stride_kn + head * stride_kh
    v_ptr += k_first * stride_vn + head * stride_vh
    dk_ptr += k_first * (H * E) + head * E
    dv_ptr += k_first * (H * E) + head * E
    dq = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for start in range(0, k_len, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < k_len
        k = load_tile(k_ptr, offs_n, mask_n, stride_kn, E, BLOCK_E)
        v = load_tile(v_ptr, offs_n, mask_n, stride_vn, E, BLOCK_E)
        k_block = block_ids(k_block_ptr, k_first + offs_n, mask_n)
        p, ds = _weights_and_grads(
            k, v, q, grad, lse, delta, scale, positions, mask_m, offs_n, mask_n, bias_at,
            stride_bn, q_block, k_block, row_keys, threshold, keep_scale,
            bias_ptr is not None, q_block_ptr is not None, seed_ptr is not None, CAUSAL, PRECISION,
        )  # fmt: skip
        dv = tl.dot(p.to(grad.dtype), grad, input_precision=PRECISION)
        store_tile(dv_ptr, offs_n, mask_n, H * E, dv, E, BLOCK_E)
        ds = ds.to(q.dtype)
        dk = tl.dot(ds, q, input_precision=PRECISION) * scale
        store_tile(dk_ptr, offs_n, mask_n, H * E, dk, E, BLOCK_E)
        dq = tl.dot(tl.trans(ds), k, dq, input_precision=PRECISION)
    store_tile(dq_ptr + head * E, rows, mask_m, H * E, dq * scale, E, BLOCK_E)
    if delta_ptr is not None:
        tl.store(delta_ptr + rows * H + head, delta, mask=mask_m)


@triton.jit(do_not_specialize=["parts", "small", "threshold"])
def attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, q_spans_ptr, k_spans_ptr, q_block_ptr, k_block_ptr, bias_ptr, seed_ptr,
    rows_ptr, seqs_ptr, tiles_ptr, out_ptr, lse_ptr, grad_ptr, dq_ptr, delta_ptr,
    parts, small,
    stride_qm, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gm, stride_gh,
    stride_br, stride_bh, stride_bm, stride_bn, scale, threshold, keep_scale,
    H: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dQ and delta of groups with more than `small` rows."""
    pid = tl.program_id(0)
    head = pid % H
    group, first, begin, end = tile_of(tiles_ptr, q_spans_ptr, pid // H, parts, BLOCK_M)
    if (first >= end) | (end - begin <= small):
        return
    place = first + tl.arange(0, BLOCK_M)
    mask_m = place < end
    rows, seqs, positions = rows_at(rows_ptr, seqs_ptr, q_spans_ptr, group, place, mask_m)
    k_first = tl.load(k_spans_ptr + 2 * group).to(tl.int64)
    k_len = tl.load(k_spans_ptr + 2 * group + 1)
    bias_at = bias_rows(bias_ptr, seqs, head, positions, stride_br, stride_bh, stride_bm)
    q_block = block_ids(q_block_ptr, rows, mask_m)
    row_keys = dropout_keys(seed_ptr, seqs, head, positions)

    q = load_tile(q_ptr + head * stride_qh, rows, mask_m, stride_qm, E, BLOCK_E)
    grad = load_tile(grad_ptr + head * stride_gh, rows, mask_m, stride_gm, E, BLOCK_E)
    out = load_tile(out_ptr + head * E, rows, mask_m, H * E, E, BLOCK_E)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + rows * H + head, delta, mask=mask_m)
    lse = _load_lse(lse_ptr, rows, mask_m, H, head)
    k_ptr += k_first * stride_kn + head * stride_kh
    v_ptr += k_first * stride_vn + head * stride_vh
    dq = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    last = k_len
    if CAUSAL:
        last = tl.minimum(k_len, tl.max(tl.where(mask_m, positions, -1), 0) + 1)
    for start in range(0, last, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < k_len
        k = load_tile(k_ptr, offs_n, mask_n, stride_kn, E, BLOCK_E)
        v = load_tile(v_ptr, offs_n, mask_n, stride_vn, E, BLOCK_E)
        k_block = block_ids(k_block_ptr, k_first + offs_n, mask_n)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        s = shown(
            s, positions[:, None], mask_m[:, None], offs_n[None, :], mask_n[None, :],
            bias_at[:, None], stride_bn,
            q_block[:, None], k_block[None, :],
            bias_ptr is not None, q_block_ptr is not None, CAUSAL,
        )  # fmt: skip
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if seed_ptr is not None:
            keep = kept(row_keys[:, None], offs_n[None, :], threshold)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    store_tile(dq_ptr + head * E, rows, mask_m, H * E, dq * scale, E, BLOCK_E)


@triton.jit(do_not_specialize=["parts", "small", "threshold"])
def attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, q_spans_ptr, k_spans_ptr, q_block_ptr, k_block_ptr, bias_ptr, seed_ptr,
    rows_ptr, seqs_ptr, group_start_ptr, lse_ptr, grad_ptr, delta_ptr, dk_ptr, dv_ptr,
    parts, small,
    stride_qm, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gm, stride_gh,
    stride_br, stride_bh, stride_bm, stride_bn, scale, threshold, keep_scale,
    H: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys, `parts` tiles a sequence, read by more than `small` rows."""
    pid = tl.program_id(0)
    head, group = pid % H, pid // H // parts
    start = (pid // H % parts) * BLOCK_N
    if group_start_ptr is not None:
        begin, end = tl.load(group_start_ptr + group), tl.load(group_start_ptr + group + 1)
    else:
        begin, end = 0, tl.load(q_spans_ptr + 2 * group + 1)
    k_first = tl.load(k_spans_ptr + 2 * group).to(tl.int64)
    k_len = tl.load(k_spans_ptr + 2 * group + 1)
    if (start >= k_len) | (end - begin <= small):
        return
    offs_n = start + tl.arange(0, BLOCK_N)
    mask_n = offs_n < k_len
    k_block = block_ids(k_block_ptr, k_first + offs_n, mask_n)
    k = load_tile(
        k_ptr + k_first * stride_kn + head * stride_kh, offs_n, mask_n, stride_kn, E, BLOCK_E
    )
    v = load_tile(
        v_ptr + k_first * stride_vn + head * stride_vh, offs_n, mask_n, stride_vn, E, BLOCK_E
    )
    dk = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    if CAUSAL and group_start_ptr is None:
        # No row before the first key of the tile sees it.
        begin = start // BLOCK_M * BLOCK_M
    for first in range(begin, end, BLOCK_M):
        place = first + tl.arange(0, BLOCK_M)
        mask_m = place < end
        rows, seqs, positions = rows_at(rows_ptr, seqs_ptr, q_spans_ptr, group, place, mask_m)
        bias_at = bias_rows(bias_ptr, seqs, head, positions, stride_br, stride_bh, stride_bm)
        q_block = block_ids(q_block_ptr, rows, mask_m)
        row_keys = dropout_keys(seed_ptr, seqs, head, positions)
        q = load_tile(q_ptr + head * stride_qh, rows, mask_m, stride_qm, E, BLOCK_E)
        grad = load_tile(grad_ptr + head * stride_gh, rows, mask_m, stride_gm, E, BLOCK_E)
        lse = _load_lse(lse_ptr, rows, mask_m, H, head)
        delta = tl.load(delta_ptr + rows * H + head, mask=mask_m, other=0.0)
        p, ds = _weights_and_grads(
            k, v, q, grad, lse, delta, scale, positions, mask_m, offs_n, mask_n, bias_at,
            stride_bn, q_block, k_block, row_keys, threshold, keep_scale,
            bias_ptr is not None, q_block_ptr is not None, seed_ptr is not None, CAUSAL, PRECISION,
        )  # fmt: skip
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    at = k_first * (H * E) + head * E
    store_tile(dv_ptr + at, offs_n, mask_n, H * E, dv, E, BLOCK_E)
    store_tile(dk_ptr + at, offs_n, mask_n, H * E, dk * scale, E, BLOCK_E)


@triton.jit(do_not_specialize=["R", "M", "N", "per_chunk", "threshold"])
def attention_bwd_dbias_kernel(
    q_ptr, k_ptr, v_ptr, q_spans_ptr, k_spans_ptr, kv_index_ptr, q_block_ptr, k_block_ptr,
    bias_ptr, seed_ptr, lse_ptr, grad_ptr, delta_ptr, dbias_ptr,
    R, M, N, per_chunk,
    stride_qm, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gm, stride_gh,
    stride_br, stride_bh, stride_bm, stride_bn, scale, threshold, keep_scale,
    H: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dbias (chunks, H, M, N): a tile of positions, summed over the sequences of a chunk in order.

    It computes dS once more: storing it would take R H M N numbers.
    """
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * tiles_n
    chunk, head, tile = pid // (tiles * H), pid // tiles % H, pid % tiles
    positions = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for r in range(chunk * per_chunk, tl.minimum((chunk + 1) * per_chunk, R)):
        group = r
        if kv_index_ptr is not None:
            group = tl.load(kv_index_ptr + r).to(tl.int32)
        mask_m = positions < tl.load(q_spans_ptr + 2 * r + 1)
        mask_n = offs_n < tl.load(k_spans_ptr + 2 * group + 1)
        rows = (tl.load(q_spans_ptr + 2 * r) + positions).to(tl.int64)
        keys = (tl.load(k_spans_ptr + 2 * group) + offs_n).to(tl.int64)
        seqs = tl.zeros_like(positions) + r
        bias_at = bias_rows(bias_ptr, seqs, head, positions, stride_br, stride_bh, stride_bm)
        q_block = block_ids(q_block_ptr, rows, mask_m)
        k_block = block_ids(k_block_ptr, keys, mask_n)
        row_keys = dropout_keys(seed_ptr, seqs, head, positions)
        k = load_tile(k_ptr + head * stride_kh, keys, mask_n, stride_kn, E, BLOCK_E)
        v = load_tile(v_ptr + head * stride_vh, keys, mask_n, stride_vn, E, BLOCK_E)
        q = load_tile(q_ptr + head * stride_qh, rows, mask_m, stride_qm, E, BLOCK_E)
        grad = load_tile(grad_ptr + head * stride_gh, rows, mask_m, stride_gm, E, BLOCK_E)
        lse = _load_lse(lse_ptr, rows, mask_m, H, head)
        delta = tl.load(delta_ptr + rows * H + head, mask=mask_m, other=0.0)
        _, ds = _weights_and_grads(
            k, v, q, grad, lse, delta, scale, positions, mask_m, offs_n, mask_n, bias_at,
            stride_bn, q_block, k_block, row_keys, threshold, keep_scale,
            bias_ptr is not None, q_block_ptr is not None, seed_ptr is not None, CAUSAL, PRECISION,
        )  # fmt: skip
        acc += ds
    at = (chunk.to(tl.int64) * H + head) * M * N
    at += positions[None, :].to(tl.int64) * N + offs_n[:, None]
    mask = (positions < M)[None, :] & (offs_n < N)[:, None]
    tl.store(dbias_ptr + at, acc.to(dbias_ptr.dtype.element_ty), mask=mask)
