"""Attention forward in Triton: a tile of rows, a loop over keys, a softmax that runs along."""

from __future__ import annotations

import triton
import triton.language as tl

from vlpfast.kernels._attention import (
    LN2,
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


@triton.jit(do_not_specialize=["parts", "threshold"])
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, q_spans_ptr, k_spans_ptr, q_block_ptr, k_block_ptr, bias_ptr, seed_ptr,
    rows_ptr, seqs_ptr, tiles_ptr, out_ptr, lse_ptr,
    parts, stride_qm, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh,
    stride_br, stride_bh, stride_bm, stride_bn, scale, threshold, keep_scale,
    H: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    # Heads of a tile are neighbours: they read the same lines of memory and the same indices.
    head = pid % H
    group, first, _, end = tile_of(tiles_ptr, q_spans_ptr, pid // H, parts, BLOCK_M)
    if first >= end:
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
    k_ptr += k_first * stride_kn + head * stride_kh
    v_ptr += k_first * stride_vn + head * stride_vh
    # exp2 throughout: log2(e) is part of the scale, and taken out of lse at the end.
    scale *= LOG2E
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    last = k_len
    if CAUSAL:
        last = tl.minimum(k_len, tl.max(tl.where(mask_m, positions, -1), 0) + 1)
    for start in range(0, last, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < k_len
        k = load_tile(k_ptr, offs_n, mask_n, stride_kn, E, BLOCK_E)
        k_block = block_ids(k_block_ptr, k_first + offs_n, mask_n)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = shown(
            s, positions[:, None], mask_m[:, None], offs_n[None, :], mask_n[None, :],
            bias_at[:, None], stride_bn,
            q_block[:, None], k_block[None, :],
            bias_ptr is not None, q_block_ptr is not None, CAUSAL,
        )  # fmt: skip
        m_new = tl.maximum(m_i, tl.max(s, 1))
        # Of a row that has seen nothing -inf - -inf would be NaN.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - m_safe[:, None])
        alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, 1)
        if seed_ptr is not None:
            p = tl.where(kept(row_keys[:, None], offs_n[None, :], threshold), p, 0.0)
        v = load_tile(v_ptr, offs_n, mask_n, stride_vn, E, BLOCK_E)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_new
    seen = l_i > 0
    l_safe = tl.where(seen, l_i, 1.0)
    acc *= (keep_scale / l_safe)[:, None]
    store_tile(out_ptr + head * E, rows, mask_m, H * E, acc, E, BLOCK_E)
    lse = tl.where(seen, (m_i + tl.log2(l_safe)) * LN2, float("-inf"))
    tl.store(lse_ptr + rows * H + head, lse, mask=mask_m)
