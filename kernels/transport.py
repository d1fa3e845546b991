"""Batched small optimal transport: one program solves one problem, whatever its size.

Letters: M = sources (rows, text), N = targets (columns, image) of one problem; m and n = those that
take part. Only these are seen: their indices are compacted first and every loop runs to m and n, in
tiles of one size, so that the bits of a problem do not depend on padding or company. Its state (A
and Q, or the cost) is in device memory that stays in the caches of the one multiprocessor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.kernels._common import INTERPRETED, AotCase

# Tiles over rows and columns of a problem, and over features in the dot products.
BLOCK_M = 32
BLOCK_N = 64
BLOCK_D = 64
# Rows of one program of the gradient, and the other side's rows it sums over at a time.
BLOCK_OWN = 32
BLOCK_OTHER = 32
# The scaling form is right from here on; below, fp32 flushes entries of the plan (ops/ipot).
LOG_DOMAIN_BETA = 0.1
# The interpreter multiplies bit patterns of bf16: it gets fp32.
_INTERPRETED = tl.constexpr(INTERPRETED)
_LOG2E = tl.constexpr(1.4426950408889634)
_NORM_EPS = tl.constexpr(1e-5)
# What each kernel compiles with, found by the ahead-of-time gate: none spills on sm_80 or sm_90.
_FWD = {"BLOCK_D": BLOCK_D, "num_warps": 8, "num_stages": 2}
_STATS = {"BLOCK_D": 32, "num_warps": 8, "num_stages": 3}
_BWD = {"BLOCK_D": BLOCK_D, "num_warps": 4, "num_stages": 2}


@triton.jit
def _compact(
    valid_ptr, pid_b, ids_ptr, slots_ptr, size, LISTED: tl.constexpr, WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Number of valid (or positive) entries; `ids` lists them, `slots` has their place or -1."""
    count = tl.full((), 0, tl.int32)
    if LISTED:
        for start in range(0, size, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            value = tl.load(valid_ptr + pid_b * size + offs, mask=offs < size, other=0)
            valid = (value > 0) if WEIGHTS else (value != 0)
            slots = count + tl.cumsum(valid.to(tl.int32), axis=0) - 1
            tl.store(ids_ptr + slots, offs, mask=valid)
            tl.store(slots_ptr + offs, tl.where(valid, slots, -1), mask=offs < size)
            count += tl.sum(valid.to(tl.int32), axis=0)
        tl.debug_barrier()
    else:
        count += size
    return count


@triton.jit
def _ids(ids_ptr, offs, size, LISTED: tl.constexpr):
    """Where the compacted rows `offs` lie among all; row 0 stands for those that do not exist."""
    if LISTED:
        return tl.load(ids_ptr + offs, mask=offs < size, other=0)
    else:
        return tl.where(offs < size, offs, 0)


@triton.jit
def _slots(slots_ptr, offs, size, LISTED: tl.constexpr):
    """Where the entries `offs` of one side are after compaction, -1 for those that are left out."""
    if LISTED:
        return tl.load(slots_ptr + offs, mask=offs < size, other=-1)
    else:
        return tl.where(offs < size, offs, -1)


@triton.jit
def _cosines(
    x_ptr, y_ptr, rows, cols, mask_m, mask_n, stride_xm, stride_yn, D, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Cosines (BLOCK_M, BLOCK_N) of two tiles of rows, and 1 / max(norm, eps) of either.

    Raw products are summed in fp32 and divided by the norms after: unit vectors are never rounded.
    """
    dots = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    xx = tl.zeros((BLOCK_M,), tl.float32)
    yy = tl.zeros((BLOCK_N,), tl.float32)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_xm
    y_rows = y_ptr + cols.to(tl.int64)[:, None] * stride_yn
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d[None, :] < D
        x = tl.load(x_rows + offs_d[None, :], mask=mask_m[:, None] & mask_d, other=0.0)
        y = tl.load(y_rows + offs_d[None, :], mask=mask_n[:, None] & mask_d, other=0.0)
        if _INTERPRETED:
            x, y = x.to(tl.float32), y.to(tl.float32)
        dots = tl.dot(x, tl.trans(y), dots, input_precision="ieee")
        x, y = x.to(tl.float32), y.to(tl.float32)
        xx += tl.sum(x * x, axis=1)
        yy += tl.sum(y * y, axis=1)
    # NaN must not be lost in a maximum.
    x_scale = 1.0 / tl.where(xx < _NORM_EPS * _NORM_EPS, _NORM_EPS, tl.sqrt(xx))
    y_scale = 1.0 / tl.where(yy < _NORM_EPS * _NORM_EPS, _NORM_EPS, tl.sqrt(yy))
    return dots * x_scale[:, None] * y_scale[None, :], x_scale, y_scale


@triton.jit
def _exp(x):
    """exp with the rounding of x * log2(e) made up for; the plan repeats an error 50 times."""
    high = x * _LOG2E
    low = tl.fma(x, _LOG2E, -high)
    return tl.exp2(high) * (1.0 + low * 0.6931471805599453)


@triton.jit
def _expm1(x):
    """exp(x) - 1; by its series where the difference would lose more than that is off."""
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0)))))
    return tl.where(tl.abs(x) < 0.1, series, tl.exp(x) - 1.0)


@triton.jit
def _scaling_columns(
    A, Q, sigma_ptr, old_ptr, new_ptr, log_ptr, m, n, N, FIRST, LAST,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """delta = 1 / (n Q^T sigma); on the first inner step Q = A T, T = sigma Q delta, before."""
    for n0 in range(0, n, BLOCK_N):
        offs_n = n0 + tl.arange(0, BLOCK_N)
        mask_n = offs_n < n
        old = tl.load(old_ptr + offs_n, mask=mask_n, other=0.0)
        total = tl.zeros((BLOCK_N,), tl.float32)
        for m0 in range(0, m, BLOCK_M):
            offs_m = m0 + tl.arange(0, BLOCK_M)
            mask = (offs_m < m)[:, None] & mask_n[None, :]
            place = offs_m[:, None] * N + offs_n[None, :]
            sigma = tl.load(sigma_ptr + offs_m, mask=offs_m < m, other=0.0)
            q = tl.load(Q + place, mask=mask, other=0.0)
            if FIRST:
                a = tl.load(A + place, mask=mask, other=0.0)
                q = q * old[None, :] * sigma[:, None] * a
                tl.store(Q + place, q, mask=mask)
            total += tl.sum(q * sigma[:, None], axis=0)
        delta = 1.0 / (n * tl.where(mask_n, total, 1.0))
        tl.store(new_ptr + offs_n, delta, mask=mask_n)
        if LAST:
            log_delta = tl.load(log_ptr + offs_n, mask=mask_n, other=0.0) + tl.log(delta)
            tl.store(log_ptr + offs_n, log_delta, mask=mask_n)


@triton.jit
def _scaling_rows(
    Q, delta_ptr, sigma_ptr, before_ptr, log_ptr, m, n, N, LAST,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sigma = 1 / (m Q delta); returns how far log sigma moved since the last outer step."""
    moved = 0.0
    for m0 in range(0, m, BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        mask_m = offs_m < m
        total = tl.zeros((BLOCK_M,), tl.float32)
        for n0 in range(0, n, BLOCK_N):
            offs_n = n0 + tl.arange(0, BLOCK_N)
            mask = mask_m[:, None] & (offs_n < n)[None, :]
            q = tl.load(Q + offs_m[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
            delta = tl.load(delta_ptr + offs_n, mask=offs_n < n, other=0.0)
            total += tl.sum(q * delta[None, :], axis=1)
        sigma = 1.0 / (m * tl.where(mask_m, total, 1.0))
        tl.store(sigma_ptr + offs_m, sigma, mask=mask_m)
        if LAST:
            log_sigma = tl.log(sigma)
            before = tl.load(before_ptr + offs_m, mask=mask_m, other=0.0)
            total_log = tl.load(log_ptr + offs_m, mask=mask_m, other=0.0) + log_sigma
            # Every thread has read before one of them writes.
            tl.debug_barrier()
            step = tl.where(mask_m, tl.abs(log_sigma - before), 0.0)
            moved = tl.maximum(moved, tl.max(step, axis=0))
            tl.store(before_ptr + offs_m, log_sigma, mask=mask_m)
            tl.store(log_ptr + offs_m, total_log, mask=mask_m)
    return moved


@triton.jit
def _log_sums(
    E, p_ptr, base, s, offs, size, other, stride, stride_other, weights_ptr, ids_ptr,
    HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """log of the sum over the other side of w exp(p + s E), for the entries `offs` of one side.

    `base` is log w where the weights are all the same. Exponents are large numbers with small
    differences, so they are fp64; exp alone, after taking off the highest, is fp32.
    """
    top = tl.full((BLOCK,), float("-inf"), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, other, OTHER):
        offs_o = start + tl.arange(0, OTHER)
        mask_o = offs_o < other
        mask = (offs < size)[:, None] & mask_o[None, :]
        e = tl.load(E + offs[:, None] * stride + offs_o[None, :] * stride_other, mask=mask,
                    other=0.0)  # fmt: skip
        p = tl.load(p_ptr + offs_o, mask=mask_o, other=0.0) + base
        if HAS_WEIGHTS:
            place = tl.load(ids_ptr + offs_o, mask=mask_o, other=0)
            p += tl.log(tl.load(weights_ptr + place, mask=mask_o, other=1.0).to(tl.float64))
        z = tl.where(mask_o[None, :], p[None, :] + s * e, float("-inf"))
        highest = tl.maximum(top, tl.max(z, axis=1))
        total *= tl.exp((top - highest).to(tl.float32)).to(tl.float64)
        terms = tl.exp((z - highest[:, None]).to(tl.float32))
        total += tl.sum(terms.to(tl.float64), axis=1)
        top = highest
    return top + tl.log(total)


@triton.jit
def _log_columns(
    E, p_ptr, q_ptr, base, s, damp, m, n, N, weights_ptr, ids_ptr,
    HAS_WEIGHTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """q = -damp log sum_i w_i exp(p_i + s E_ij)."""
    for n0 in range(0, n, BLOCK_N):
        offs_n = n0 + tl.arange(0, BLOCK_N)
        sums = _log_sums(
            E, p_ptr, base, s, offs_n, n, m, 1, N, weights_ptr, ids_ptr, HAS_WEIGHTS, BLOCK_N,
            BLOCK_M,
        )  # fmt: skip
        tl.store(q_ptr + offs_n, -damp * sums, mask=offs_n < n)


@triton.jit
def _log_rows(
    E, q_ptr, p_ptr, start_ptr, f_ptr, base, s, damp, m, n, N, weights_ptr, ids_ptr, LAST,
    EXTRAPOLATE: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """f = -damp log sum_j w_j exp(q_j + s E_ij); returns how far f is from where the step began.

    The next step begins at f, or at 2 f - (f before), which is where a warm sigma puts it.
    """
    moved = tl.full((), 0.0, tl.float64)
    for m0 in range(0, m, BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        mask_m = offs_m < m
        sums = _log_sums(
            E, q_ptr, base, s, offs_m, m, n, N, 1, weights_ptr, ids_ptr, HAS_WEIGHTS, BLOCK_M,
            BLOCK_N,
        )  # fmt: skip
        f = -damp * sums
        p = f
        if LAST:
            begun = tl.load(start_ptr + offs_m, mask=mask_m, other=0.0)
            step = tl.where(mask_m, tl.abs(f - begun), 0.0)
            moved = tl.maximum(moved, tl.max(step, axis=0))
            if EXTRAPOLATE:
                p = 2.0 * f - tl.load(f_ptr + offs_m, mask=mask_m, other=0.0)
            # Every thread has read before one of them writes.
            tl.debug_barrier()
            tl.store(start_ptr + offs_m, p, mask=mask_m)
            tl.store(f_ptr + offs_m, f, mask=mask_m)
        tl.store(p_ptr + offs_m, p, mask=mask_m)
    return moved


@triton.jit
def _dual_side(
    p_ptr, eps, weights_ptr, ids_ptr, size, tau, HAS_TAU: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_i w_i phi(eps p_i; tau) and sum_i w_i of one side, fp64: they nearly cancel."""
    dual = tl.full((), 0.0, tl.float64)
    mass = tl.full((), 0.0, tl.float64)
    for start in range(0, size, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < size
        f = eps * tl.load(p_ptr + offs, mask=mask, other=0.0)
        place = tl.load(ids_ptr + offs, mask=mask, other=0)
        weight = tl.load(weights_ptr + place, mask=mask, other=0.0).to(tl.float64)
        if HAS_TAU:
            f = -tau * _expm1(-f / tau)
        dual += tl.sum(weight * f, axis=0)
        mass += tl.sum(weight, axis=0)
    return dual, mass


@triton.jit
def _transport_fwd_kernel(
    x_ptr, y_ptr, cost_ptr, x_valid_ptr, y_valid_ptr, f_init_ptr,
    state_ptr, work_ptr, ids_ptr, distance_ptr, value_ptr, plan_ptr, f_ptr, g_ptr, num_iters_ptr,
    M, N, D, stride_xb, stride_xm, stride_yb, stride_yn,
    rate, rate_low, iters, inner, tol, damp_a, damp_b, tau_a, tau_b,
    FROM_COST: tl.constexpr, SINKHORN: tl.constexpr, LOG: tl.constexpr,
    HAS_X_VALID: tl.constexpr, HAS_Y_VALID: tl.constexpr, HAS_F_INIT: tl.constexpr,
    HAS_TOL: tl.constexpr, HAS_TAU_A: tl.constexpr, HAS_TAU_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """E = cosine (or -cost), then iterations, then distance, plan and potentials of one problem.

    `rate` + `rate_low` is 1 / beta or 1 / eps. A cosine instead of 1 - cosine scales delta only,
    which g makes up for at the end, and it is rounded more finely.
    """
    SHIFT: tl.constexpr = 0.0 if FROM_COST else 1.0  # cost = SHIFT - E
    pid_b = tl.program_id(0).to(tl.int64)
    E = state_ptr + pid_b * 2 * M * N  # scaling form: A
    Q = E + M * N
    work = work_ptr + pid_b * 3 * (M + N)
    x0, x1, x2 = work, work + M, work + 2 * M
    y0, y2 = work + 3 * M, work + 3 * M + 2 * N
    x_ids = ids_ptr + pid_b * 2 * (M + N)
    x_slots, y_ids, y_slots = x_ids + M, x_ids + 2 * M, x_ids + 2 * M + N
    m = _compact(x_valid_ptr, pid_b, x_ids, x_slots, M, HAS_X_VALID, SINKHORN, BLOCK_M)
    n = _compact(y_valid_ptr, pid_b, y_ids, y_slots, N, HAS_Y_VALID, SINKHORN, BLOCK_N)
    a_ptr, b_ptr = x_valid_ptr, y_valid_ptr
    if SINKHORN:
        a_ptr += pid_b * M
        b_ptr += pid_b * N
    precise: tl.constexpr = tl.float64 if LOG else tl.float32
    log_m, log_n = tl.log(m.to(precise)), tl.log(n.to(precise))
    s_step = tl.full((), 0.0, precise) + rate + rate_low
    plan = plan_ptr + pid_b * M * N

    # The plan's memory keeps E where the state holds A.
    keep = E
    if not LOG:
        keep = plan
    for m0 in range(0, m, BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        mask_m = offs_m < m
        rows = _ids(x_ids, offs_m, m, HAS_X_VALID)
        for n0 in range(0, n, BLOCK_N):
            offs_n = n0 + tl.arange(0, BLOCK_N)
            mask = mask_m[:, None] & (offs_n < n)[None, :]
            cols = _ids(y_ids, offs_n, n, HAS_Y_VALID)
            if FROM_COST:
                place = rows.to(tl.int64)[:, None] * N + cols[None, :]
                e = -tl.load(cost_ptr + pid_b * M * N + place, mask=mask, other=0.0)
            else:
                e, _, _ = _cosines(
                    x_ptr + pid_b * stride_xb, y_ptr + pid_b * stride_yb, rows, cols, mask_m,
                    offs_n < n, stride_xm, stride_yn, D, BLOCK_D, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            place = offs_m[:, None] * N + offs_n[None, :]
            tl.store(keep + place, e, mask=mask)
            if not LOG:
                tl.store(E + place, _exp(e * rate), mask=mask)
                tl.store(Q + place, tl.full((BLOCK_M, BLOCK_N), 1.0, tl.float32), mask=mask)
    for m0 in range(0, m, BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        mask_m = offs_m < m
        zeros = tl.zeros((BLOCK_M,), precise)
        if LOG:
            begin = zeros
            if HAS_F_INIT:
                rows = _ids(x_ids, offs_m, m, HAS_X_VALID)
                begin = tl.load(f_init_ptr + pid_b * M + rows, mask=mask_m, other=0.0)
                begin = begin.to(precise) * s_step
            tl.store(x0 + offs_m, begin, mask=mask_m)
            tl.store(x1 + offs_m, begin, mask=mask_m)
            tl.store(x2 + offs_m, zeros + log_m, mask=mask_m)  # sigma = 1 / m
        else:
            tl.store(x0 + offs_m, zeros + 1.0 / m, mask=mask_m)
            tl.store(x1 + offs_m, zeros - log_m, mask=mask_m)
            tl.store(x2 + offs_m, zeros, mask=mask_m)
    for n0 in range(0, n, BLOCK_N):
        offs_n = n0 + tl.arange(0, BLOCK_N)
        # T = 1 before the first step: delta there makes up for sigma = 1 / m.
        tl.store(y0 + offs_n, tl.zeros((BLOCK_N,), tl.float32) + m, mask=offs_n < n)
        tl.store(y2 + offs_n, tl.zeros((BLOCK_N,), tl.float32), mask=offs_n < n)
    tl.debug_barrier()

    t = 0
    flip = 0
    going = (m > 0) & (n > 0)
    if not going:
        m *= 0
        n *= 0
    s = s_step
    while going:
        moved = tl.full((), 0.0, precise)
        if LOG and not SINKHORN:
            s = (t + 1) * s_step
        for k in range(inner):
            last = k == inner - 1
            if LOG:
                # Every problem of Sinkhorn lists its rows, those of weight > 0.
                _log_columns(
                    E, x0, y0, 0.0 if SINKHORN else -log_m, s, damp_b, m, n, N, a_ptr, x_ids,
                    SINKHORN, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                tl.debug_barrier()
                moved = _log_rows(
                    E, y0, x0, x1, x2, 0.0 if SINKHORN else -log_n, s, damp_a, m, n, N, b_ptr,
                    y_ids, last, not SINKHORN, SINKHORN, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            else:
                # Two places for delta: the old one is read while the new one is written.
                old, new = y0 + flip * N, y0 + (1 - flip) * N
                _scaling_columns(E, Q, x0, old, new, y2, m, n, N, k == 0, last, BLOCK_M, BLOCK_N)
                tl.debug_barrier()
                moved = _scaling_rows(Q, new, x0, x1, x2, m, n, N, last, BLOCK_M, BLOCK_N)
                flip = 1 - flip
            tl.debug_barrier()
        t += 1
        going = t < iters
        if HAS_TOL:
            going = going & (moved > tol * rate)

    # Distance and plan in compacted places, then all of it to where it belongs.
    distance, mass = 0.0, 0.0
    for m0 in range(0, m, BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        mask_m = offs_m < m
        for n0 in range(0, n, BLOCK_N):
            offs_n = n0 + tl.arange(0, BLOCK_N)
            mask_n = offs_n < n
            mask = mask_m[:, None] & mask_n[None, :]
            place = offs_m[:, None] * N + offs_n[None, :]
            e = tl.load(keep + place, mask=mask, other=0.0)
            if LOG:
                p = tl.load(x2 + offs_m, mask=mask_m, other=0.0)
                q = tl.load(y0 + offs_n, mask=mask_n, other=0.0)
                z = tl.where(mask, p[:, None] + q[None, :] + s * e, float("-inf"))
                transported = tl.exp(z.to(tl.float32))
                if SINKHORN:
                    rows = _ids(x_ids, offs_m, m, True)
                    cols = _ids(y_ids, offs_n, n, True)
                    transported *= tl.load(a_ptr + rows, mask=mask_m, other=0.0)[:, None]
                    transported *= tl.load(b_ptr + cols, mask=mask_n, other=0.0)[None, :]
                else:
                    transported *= 1.0 / (m * n)
            else:
                sigma = tl.load(x0 + offs_m, mask=mask_m, other=0.0)
                delta = tl.load(y0 + flip * N + offs_n, mask=mask_n, other=0.0)
                q = tl.load(Q + place, mask=mask, other=0.0)
                transported = q * delta[None, :] * sigma[:, None]
            transported = tl.where(mask, transported, 0.0)
            distance += tl.sum(tl.sum((SHIFT - e) * transported, axis=1), axis=0)
            mass += tl.sum(tl.sum(transported, axis=1), axis=0)
            tl.store(Q + place, transported, mask=mask)
    tl.debug_barrier()
    for m0 in range(0, M, BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        rows = _slots(x_slots, offs_m, M, HAS_X_VALID)
        for n0 in range(0, N, BLOCK_N):
            offs_n = n0 + tl.arange(0, BLOCK_N)
            cols = _slots(y_slots, offs_n, N, HAS_Y_VALID)
            mask = (rows >= 0)[:, None] & (cols >= 0)[None, :] & (m > 0)
            transported = tl.load(Q + rows[:, None] * N + cols[None, :], mask=mask, other=0.0)
            inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
            tl.store(plan + offs_m[:, None] * N + offs_n[None, :], transported, mask=inside)

    eps = 1.0 / s_step
    if not SINKHORN:
        eps = 1.0 / (s_step * tl.maximum(t, 1))
    if SINKHORN:
        dual, sum_a = _dual_side(x2, eps, a_ptr, x_ids, m, tau_a, HAS_TAU_A, BLOCK_M)
        dual_b, sum_b = _dual_side(y0, eps, b_ptr, y_ids, n, tau_b, HAS_TAU_B, BLOCK_N)
        value = dual + dual_b - eps * (mass.to(tl.float64) - sum_a * sum_b)
        tl.store(value_ptr + pid_b, value.to(tl.float32))
    for m0 in range(0, M, BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        rows = _slots(x_slots, offs_m, M, HAS_X_VALID)
        mask = (rows >= 0) & (m > 0)
        f = (eps * tl.load(x2 + rows, mask=mask, other=0.0)).to(tl.float32)
        if not LOG:
            f = tl.where(mask, f + eps * log_m, 0.0)
        tl.store(f_ptr + pid_b * M + offs_m, f, mask=offs_m < M)
    for n0 in range(0, N, BLOCK_N):
        offs_n = n0 + tl.arange(0, BLOCK_N)
        cols = _slots(y_slots, offs_n, N, HAS_Y_VALID)
        mask = (cols >= 0) & (n > 0)
        if LOG:
            g = (eps * tl.load(y0 + cols, mask=mask, other=0.0) + SHIFT).to(tl.float32)
        else:
            g = eps * (tl.load(y2 + cols, mask=mask, other=0.0) + log_n) + SHIFT
        g = tl.where(mask, g, 0.0)
        tl.store(g_ptr + pid_b * N + offs_n, g, mask=offs_n < N)
    tl.store(distance_ptr + pid_b, distance)
    tl.store(num_iters_ptr + pid_b, t.to(tl.int64))


@triton.jit
def _transport_stats_kernel(
    x_ptr, y_ptr, x_valid_ptr, y_valid_ptr, plan_ptr, ids_ptr, stats_ptr,
    M, N, D, stride_xb, stride_xm, stride_yb, stride_yn,
    HAS_X_VALID: tl.constexpr, HAS_Y_VALID: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """1 / |row| and sum_j T_ij S_ij (S the cosines) of every row of x and y; their compaction.

    The second is <row / |row|, z>, the gradient's part along the row. ids: as the forward's, and
    m and n at its end; stats (B, 2, M + N).
    """
    pid_b = tl.program_id(0).to(tl.int64)
    x_ids = ids_ptr + pid_b * (2 * (M + N) + 2)
    x_slots, y_ids, y_slots = x_ids + M, x_ids + 2 * M, x_ids + 2 * M + N
    m = _compact(x_valid_ptr, pid_b, x_ids, x_slots, M, HAS_X_VALID, False, BLOCK_M)
    n = _compact(y_valid_ptr, pid_b, y_ids, y_slots, N, HAS_Y_VALID, False, BLOCK_N)
    tl.store(x_ids + 2 * (M + N), m)
    tl.store(x_ids + 2 * (M + N) + 1, n)
    scales = stats_ptr + pid_b * 2 * (M + N)
    alongs = scales + M + N
    for m0 in range(0, m, BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        mask_m = offs_m < m
        rows = _ids(x_ids, offs_m, m, HAS_X_VALID)
        x_along = tl.zeros((BLOCK_M,), tl.float32)
        for n0 in range(0, n, BLOCK_N):
            offs_n = n0 + tl.arange(0, BLOCK_N)
            mask_n = offs_n < n
            cols = _ids(y_ids, offs_n, n, HAS_Y_VALID)
            cosines, x_scale, y_scale = _cosines(
                x_ptr + pid_b * stride_xb, y_ptr + pid_b * stride_yb, rows, cols, mask_m, mask_n,
                stride_xm, stride_yn, D, BLOCK_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            place = rows.to(tl.int64)[:, None] * N + cols[None, :]
            mask = mask_m[:, None] & mask_n[None, :]
            t = tl.load(plan_ptr + pid_b * M * N + place, mask=mask, other=0.0)
            x_along += tl.sum(t * cosines, axis=1)
            y_along = tl.sum(t * cosines, axis=0)
            if m0 > 0:
                y_along += tl.load(alongs + M + cols, mask=mask_n, other=0.0)
            tl.store(alongs + M + cols, y_along, mask=mask_n)
            tl.store(scales + M + cols, y_scale, mask=mask_n)
            tl.store(scales + rows, x_scale, mask=mask_m)
        tl.store(alongs + rows, x_along, mask=mask_m)
        tl.debug_barrier()


@triton.jit
def _transport_bwd_kernel(
    own_ptr, other_ptr, plan_ptr, ids_ptr, stats_ptr, grad_ptr, matched_ptr, weight, out_ptr,
    M, N, D, stride_ob, stride_om, stride_kb, stride_kn,
    SIDE_Y: tl.constexpr, OWN_LISTED: tl.constexpr, OTHER_LISTED: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of rows of one side, BLOCK_D features of it.

    -u (sum_k T_ik other_k / |other_k| - own_i / |own_i| along_i) / |own_i|;  u = +-weight or grad.
    """
    pid_b = tl.program_id(2).to(tl.int64)
    offs_o = tl.program_id(0) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d[None, :] < D
    ids = ids_ptr + pid_b * (2 * (M + N) + 2)
    scales = stats_ptr + pid_b * 2 * (M + N)
    alongs = scales + M + N
    if SIDE_Y:
        num_own, num_other = N, tl.load(ids + 2 * (M + N))
        own_slots, other_ids = ids + 2 * M + N, ids
        own_scales, other_scales, own_alongs = scales + M, scales, alongs + M
        stride_own, stride_other = 1, N
    else:
        num_own, num_other = M, tl.load(ids + 2 * (M + N) + 1)
        own_slots, other_ids = ids + M, ids + 2 * M
        own_scales, other_scales, own_alongs = scales, scales + M, alongs
        stride_own, stride_other = N, 1
    mask_o = (_slots(own_slots, offs_o, num_own, OWN_LISTED) >= 0) & (num_other > 0)

    z = tl.zeros((BLOCK_OWN, BLOCK_D), tl.float32)
    if tl.max(mask_o.to(tl.int32), axis=0) > 0:
        for start in range(0, num_other, BLOCK_OTHER):
            offs_k = start + tl.arange(0, BLOCK_OTHER)
            mask_k = offs_k < num_other
            others = _ids(other_ids, offs_k, num_other, OTHER_LISTED)
            scale = tl.load(other_scales + others, mask=mask_k, other=0.0)
            place = offs_o.to(tl.int64)[:, None] * stride_own + others[None, :] * stride_other
            t = tl.load(
                plan_ptr + pid_b * M * N + place, mask=mask_o[:, None] & mask_k[None, :], other=0.0
            )
            t *= scale[None, :]
            k = tl.load(
                other_ptr + pid_b * stride_kb + others.to(tl.int64)[:, None] * stride_kn
                + offs_d[None, :], mask=mask_k[:, None] & mask_d, other=0.0,
            )  # fmt: skip
            if k.dtype == tl.bfloat16 and not _INTERPRETED:
                # The plan as a sum of two bf16: 16 bits of its 24.
                high = t.to(tl.bfloat16)
                z = tl.dot(high, k, z)
                z = tl.dot((t - high.to(tl.float32)).to(tl.bfloat16), k, z)
            else:
                # fp16 has no room for entries of a plan.
                z = tl.dot(t, k.to(tl.float32), z, input_precision="ieee")

    own_rows = own_ptr + pid_b * stride_ob + offs_o.to(tl.int64)[:, None] * stride_om
    own = tl.load(own_rows + offs_d[None, :], mask=mask_o[:, None] & mask_d, other=0.0)
    scale = tl.load(own_scales + offs_o, mask=mask_o, other=0.0)
    # A clamped norm is a constant: nothing to project.
    along = tl.where(
        scale < 1.0 / _NORM_EPS, tl.load(own_alongs + offs_o, mask=mask_o, other=0.0), 0.0
    )
    if SIGNED:
        u = tl.where(tl.load(matched_ptr + pid_b) != 0, weight, -weight)
    else:
        u = tl.load(grad_ptr + pid_b)
    grad = -u * scale[:, None] * (z - own.to(tl.float32) * (scale * along)[:, None])
    grad = tl.where(mask_o[:, None], grad, 0.0)
    out = out_ptr + (pid_b * num_own + offs_o)[:, None] * D + offs_d[None, :]
    tl.store(out, grad.to(out_ptr.dtype.element_ty), mask=(offs_o < num_own)[:, None] & mask_d)


@triton.jit
def _wra_loss_kernel(distance_ptr, matched_ptr, loss_ptr, B, weight, BLOCK_B: tl.constexpr):
    """weight * sum_b (matched ? d_b : -d_b), one program, in order."""
    total = tl.zeros((BLOCK_B,), tl.float32)
    for start in range(0, B, BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)
        distance = tl.load(distance_ptr + offs_b, mask=offs_b < B, other=0.0)
        matched = tl.load(matched_ptr + offs_b, mask=offs_b < B, other=0)
        total += tl.where(matched != 0, distance, -distance)
    tl.store(loss_ptr, weight * tl.sum(total, axis=0))


def _max_registers(feature: str, sinkhorn: bool) -> int | None:
    # Left to itself ptxas stops at 128 in these and spills a few bytes.
    return 160 if feature != "fp32" and not sinkhorn else None


def _rounding(value: float) -> float:
    """What fp32, the type of a kernel's scalars, takes off a number."""
    return value - torch.tensor(value, dtype=torch.float32, device="cpu").item()


def _feature_name(features: tuple[Tensor, Tensor] | None) -> str:
    """Triton's name of the features' type, or "cost" where there are none."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names[features[0].dtype] if features else "cost"


def _solve(
    features: tuple[Tensor, Tensor] | None, cost: Tensor | None, valid: tuple[Tensor | None, ...],
    f_init: Tensor | None, rate: float, iters: int, inner: int, tol: float | None,
    tau: tuple[float | None, float | None], *, sinkhorn: bool, log: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """distance, value (Sinkhorn's), plan, f, g and num_iters of every problem."""
    x, y = features or (cost, cost)
    (B, M), N = x.shape[:2], (y.shape[1] if features else cost.shape[2])
    new = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device=x.device)
    state = new(B, 2, M, N)
    work = new(B, 3 * (M + N), dtype=torch.float64 if log else torch.float32)
    ids = new(B, 2 * (M + N), dtype=torch.int32)
    distance, value = new(B), new(B) if sinkhorn else None
    plan, f, g = new(B, M, N), new(B, M), new(B, N)
    num_iters = new(B, dtype=torch.int64)
    damp_a, damp_b = (1.0 if t is None else t / (t + 1 / rate) for t in tau)
    _transport_fwd_kernel[(B,)](
        x, y, cost, *valid, f_init,
        state, work, ids, distance, value, plan, f, g, num_iters,
        M, N, x.shape[2] if features else 0, x.stride(0), x.stride(1), y.stride(0), y.stride(1),
        rate, _rounding(rate), iters, inner, tol or 0.0, damp_a, damp_b, tau[0] or 1.0,
        tau[1] or 1.0,
        FROM_COST=features is None, SINKHORN=sinkhorn, LOG=log,
        HAS_X_VALID=valid[0] is not None, HAS_Y_VALID=valid[1] is not None,
        HAS_F_INIT=f_init is not None, HAS_TOL=tol is not None,
        HAS_TAU_A=tau[0] is not None, HAS_TAU_B=tau[1] is not None,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, **_FWD,
        maxnreg=_max_registers(_feature_name(features), sinkhorn),
    )  # fmt: skip
    return distance, value, plan, f, g, num_iters


def ipot_fwd(
    x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, beta: float, iters: int,
    inner: int, tol: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """distance (B,), plan (B, M, N), f (B, M), g (B, N), num_iters (B,); see ops.ipot."""
    distance, _, *rest = _solve(
        (x, y), None, (x_mask, y_mask), None, 1 / beta, iters, inner, tol, (None, None),
        sinkhorn=False, log=beta < LOG_DOMAIN_BETA,
    )  # fmt: skip
    return (distance, *rest)


def ipot_cost_fwd(
    cost: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, beta: float, iters: int, inner: int,
    tol: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`ipot_fwd` on a given cost (B, M, N), in logarithms: a cost may be of any size."""
    distance, _, *rest = _solve(
        None, cost, (x_mask, y_mask), None, 1 / beta, iters, inner, tol, (None, None),
        sinkhorn=False, log=True,
    )  # fmt: skip
    return (distance, *rest)


def sinkhorn_fwd(
    cost: Tensor, a: Tensor, b: Tensor, f_init: Tensor | None, eps: float, iters: int,
    tol: float | None, tau_a: float | None, tau_b: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """distance, value (B,), plan (B, M, N), f (B, M), g (B, N), num_iters (B,); ops.sinkhorn."""
    return _solve(
        None, cost, (a, b), f_init, 1 / eps, iters, 1, tol, (tau_a, tau_b), sinkhorn=True, log=True
    )


def _gradients(
    x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, plan: Tensor,
    grad_distance: Tensor | None, matched: Tensor | None, weight: float, need: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of sum_b u_b distance_b, u = grad_distance or +-weight; empty if not needed."""
    (B, M, D), N = x.shape, y.shape[1]
    ids = torch.empty(B, 2 * (M + N) + 2, dtype=torch.int32, device=x.device)
    stats = torch.empty(B, 2, M + N, dtype=torch.float32, device=x.device)
    _transport_stats_kernel[(B,)](
        x, y, x_mask, y_mask, plan, ids, stats,
        M, N, D, x.stride(0), x.stride(1), y.stride(0), y.stride(1),
        HAS_X_VALID=x_mask is not None, HAS_Y_VALID=y_mask is not None,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, **_STATS,
    )  # fmt: skip
    grads = []
    for side_y, own, other in ((False, x, y), (True, y, x)):
        if not need[side_y]:
            grads.append(own.new_empty(0))
            continue
        grad = torch.empty(own.shape, dtype=own.dtype, device=own.device)
        listed = [mask is not None for mask in (x_mask, y_mask)]
        _transport_bwd_kernel[(triton.cdiv(own.shape[1], BLOCK_OWN), triton.cdiv(D, BLOCK_D), B)](
            own, other, plan, ids, stats, grad_distance, matched, weight, grad,
            M, N, D, own.stride(0), own.stride(1), other.stride(0), other.stride(1),
            SIDE_Y=side_y, OWN_LISTED=listed[side_y], OTHER_LISTED=listed[not side_y],
            SIGNED=matched is not None,
            BLOCK_OWN=BLOCK_OWN, BLOCK_OTHER=BLOCK_OTHER, **_BWD,
        )  # fmt: skip
        grads.append(grad)
    return grads[0], grads[1]


def ipot_bwd(
    grad_distance: Tensor, x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None,
    plan: Tensor, need_x: bool, need_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the features at a constant plan, (0,) where not needed."""
    need = (need_x, need_y)
    return _gradients(x, y, x_mask, y_mask, plan, grad_distance, None, 0.0, need)


def wra_fwd(
    text: Tensor, image: Tensor, text_mask: Tensor | None, image_mask: Tensor | None,
    matched: Tensor, beta: float, iters: int, weight: float, need_text: bool, need_image: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss (), distance (B,) and the loss's gradients, (0,) where not needed; see ops.wra_loss."""
    distance, plan, *_ = ipot_fwd(text, image, text_mask, image_mask, beta, iters, 1, None)
    loss = torch.empty((), dtype=torch.float32, device=text.device)
    weight /= text.shape[0]
    _wra_loss_kernel[(1,)](distance, matched, loss, text.shape[0], weight, BLOCK_B=1024)
    need = (need_text, need_image)
    if not any(need):
        return loss, distance, text.new_empty(0), image.new_empty(0)
    grads = _gradients(text, image, text_mask, image_mask, plan, None, matched, weight, need)
    return loss, distance, *grads


def _aot_case(
    name: str, kernel: triton.JITFunction, feature: str, options: dict[str, int],
    max_registers: int, **constants: bool | int,
) -> AotCase:  # fmt: skip
    """`feature`: Triton's type of the features; the other arguments have one type each."""
    special = {
        "ids_ptr": "*i32",
        "num_iters_ptr": "*i64",
        "matched_ptr": "*i1",
        "work_ptr": "*fp64" if constants.get("LOG") else "*fp32",
        "x_valid_ptr": "*fp32" if constants.get("SINKHORN") else "*i1",
        "y_valid_ptr": "*fp32" if constants.get("SINKHORN") else "*i1",
    }
    element = "fp32" if feature == "cost" else feature
    special |= dict.fromkeys(("x_ptr", "y_ptr", "own_ptr", "other_ptr", "out_ptr"), f"*{element}")
    special |= dict.fromkeys(("M", "N", "D", "B", "iters", "inner"), "i32")
    constants |= {k: v for k, v in options.items() if k.isupper()}
    types = {
        argument: special.get(
            argument,
            "*fp32" if argument.endswith("_ptr") else "i32" if "stride" in argument else "fp32",
        )
        for argument in kernel.arg_names
        if argument not in constants
    }
    # D = 768: rows of features start at multiples of 16.
    divisible = [a for a in types if a == "D" or a.startswith("stride_")]
    words = ("HMMA",) if feature == "bf16" else ()
    return AotCase(
        f"transport-{name}", kernel, types, constants, divisible, options.get("num_warps", 4),
        options.get("num_stages", 2), max_registers, instructions={80: words, 90: words},
        maxnreg=_max_registers(feature, constants.get("SINKHORN", True)),
    )  # fmt: skip


_TILES = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
_MASKS = {"HAS_X_VALID": True, "HAS_Y_VALID": True}
_EXTRAS = ("HAS_F_INIT", "HAS_TOL", "HAS_TAU_A", "HAS_TAU_B")


def _feature_cases(feature: str) -> list[AotCase]:
    found = [
        _aot_case(
            f"ipot-{'log' if log else 'scaling'}-{feature}", _transport_fwd_kernel, feature,
            _FWD | _TILES, 160, FROM_COST=False, SINKHORN=False, LOG=log, **_MASKS,
            **dict.fromkeys(_EXTRAS, False),
        )
        for log in (False, True)
    ]  # fmt: skip
    found.append(
        _aot_case(
            f"stats-{feature}", _transport_stats_kernel, feature, _STATS | _TILES, 200, **_MASKS
        )
    )
    for side_y in (False, True):
        options = _BWD | {"BLOCK_OWN": BLOCK_OWN, "BLOCK_OTHER": BLOCK_OTHER}
        found.append(
            _aot_case(
                f"grad-{'y' if side_y else 'x'}-{feature}", _transport_bwd_kernel, feature,
                options, 128, SIDE_Y=side_y, OWN_LISTED=True, OTHER_LISTED=True, SIGNED=side_y,
            )
        )  # fmt: skip
    return found


AOT_CASES = [
    *_feature_cases("bf16"),
    *_feature_cases("fp32"),
    _aot_case(
        "ipot-cost", _transport_fwd_kernel, "cost", _FWD | _TILES, 160, FROM_COST=True,
        SINKHORN=False, LOG=True, **_MASKS, **dict.fromkeys(_EXTRAS, False),
    ),
    _aot_case(
        "sinkhorn", _transport_fwd_kernel, "cost", _FWD | _TILES, 232, FROM_COST=True,
        SINKHORN=True, LOG=True, **_MASKS, **dict.fromkeys(_EXTRAS, True),
    ),
    _aot_case("wra-loss", _wra_loss_kernel, "fp32", {}, 64, BLOCK_B=1024),
]  # fmt: skip
