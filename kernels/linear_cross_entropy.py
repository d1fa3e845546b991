"""Cross-entropy over a vocabulary: one program per row of logits (loss, then the gradient in the
logits' place), column sums for the bias, and projection + log-sum-exp without logits in memory.

Letters: M rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.kernels._common import AotCase

# Below every logit: a maximum of nothing, from which a difference is no NaN.
_LOWEST = tl.constexpr(-1.0e30)

_BLOCK_V, _NUM_WARPS = 4096, 8
_SUM_ROWS, _SUM_COLS = 32, 128
# Programs of the fused forward: two for each SM of an H200.
_PROGRAMS = 264


@triton.jit
def _load_logits(
    logits_row, bias_ptr, offs_v, mask_v, target, target_logit,
    HAS_BIAS: tl.constexpr, HAS_EXACT: tl.constexpr,
):  # fmt: skip
    z = tl.load(logits_row + offs_v, mask=mask_v, other=float("-inf")).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0)
    if HAS_EXACT:
        z = tl.where(offs_v == target, target_logit, z)
    return z


@triton.jit
def _linear_cross_entropy_pass_kernel(
    logits_ptr, bias_ptr, target_ptr, exact_ptr, teacher_ptr, teacher_bias_ptr, loss_ptr,
    V, stride_lm, stride_tm, ignore_index, hard, smooth, alpha,
    HAS_BIAS: tl.constexpr, HAS_EXACT: tl.constexpr, HAS_TEACHER: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr, WRITE_GRAD: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + pid_m * stride_lm
    if HAS_TEACHER:
        teacher_row = teacher_ptr + pid_m * stride_tm
    target = tl.load(target_ptr + pid_m)
    ignored = target == ignore_index
    valid = (target >= 0) & (target < V)
    at = tl.where(valid, target, 0)
    if HAS_EXACT:
        target_logit = tl.load(exact_ptr + pid_m)
    else:
        target_logit = tl.load(logits_row + at).to(tl.float32)
    if HAS_BIAS:
        target_logit += tl.load(bias_ptr + at)

    # Everything is relative to the target's logit, which the targets' weights, summing to 1, allow.
    m = tl.full([], _LOWEST, tl.float32)
    l = tl.full([], 0.0, tl.float32)
    m_teacher = tl.full([], _LOWEST, tl.float32)
    l_teacher = tl.full([], 0.0, tl.float32)
    cross = tl.full([], 0.0, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        z = _load_logits(
            logits_row, bias_ptr, offs_v, mask_v, at, target_logit, HAS_BIAS, HAS_EXACT
        )
        m_new = tl.maximum(m, tl.max(z, axis=0))
        l = l * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new), axis=0)
        m = m_new
        above = tl.where(mask_v, z - target_logit, 0.0)
        total += tl.sum(above, axis=0)
        if HAS_TEACHER:
            t = _load_logits(
                teacher_row, teacher_bias_ptr, offs_v, mask_v, at, 0.0, HAS_TEACHER_BIAS, False
            )
            m_new = tl.maximum(m_teacher, tl.max(t, axis=0))
            e = tl.exp(t - m_new)
            factor = tl.exp(m_teacher - m_new)
            l_teacher = l_teacher * factor + tl.sum(e, axis=0)
            cross = cross * factor + tl.sum(e * above, axis=0)
            m_teacher = m_new
    log_l = tl.log(l)
    loss = (m - target_logit) + log_l
    if smooth > 0:
        loss -= smooth * total
    if HAS_TEACHER:
        loss -= alpha * (cross / l_teacher)
    # A target out of range shows as NaN: raising would need the host to wait.
    loss = tl.where(valid, loss, float("nan"))
    tl.store(loss_ptr + pid_m, tl.where(ignored, 0.0, loss))

    if WRITE_GRAD:
        log_l = tl.where(valid, log_l, float("nan"))
        log_l_teacher = tl.log(l_teacher)
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            mask_v = offs_v < V
            z = _load_logits(
                logits_row, bias_ptr, offs_v, mask_v, at, target_logit, HAS_BIAS, HAS_EXACT
            )
            g = tl.exp((z - m) - log_l) - smooth - tl.where(offs_v == at, hard, 0.0)
            if HAS_TEACHER:
                t = _load_logits(
                    teacher_row, teacher_bias_ptr, offs_v, mask_v, at, 0.0, HAS_TEACHER_BIAS, False
                )
                g -= alpha * tl.exp((t - m_teacher) - log_l_teacher)
            g = tl.where(ignored, 0.0, g)
            tl.store(logits_row + offs_v, g.to(logits_ptr.dtype.element_ty), mask=mask_v)


@triton.jit
def _linear_cross_entropy_bias_grad_kernel(
    dlogits_ptr, scale_ptr, out_ptr,
    M, V, stride_gm,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    acc = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, M, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        rows = dlogits_ptr + offs_m.to(tl.int64)[:, None] * stride_gm
        g = tl.load(rows + offs_v[None, :], mask=mask_m[:, None] & mask_v[None, :], other=0.0)
        scale = tl.load(scale_ptr + offs_m, mask=mask_m, other=0.0)
        acc += tl.sum(g.to(tl.float32) * scale[:, None], axis=0)
    tl.store(out_ptr + offs_v, acc, mask=mask_v)


@triton.jit
def _linear_cross_entropy_fwd_kernel(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, m_ptr, l_ptr, picked_ptr, total_ptr,
    M, V, D, blocks_per_split,
    stride_hm, stride_hd, stride_wv, stride_wd,
    HAS_BIAS: tl.constexpr, IEEE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(0)
    pid_s = tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    offs_d = tl.arange(0, BLOCK_D)
    hidden_rows = hidden_ptr + offs_m.to(tl.int64)[:, None] * stride_hm
    target = tl.load(target_ptr + offs_m, mask=mask_m, other=-1)

    m_i = tl.full([BLOCK_M], _LOWEST, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    picked = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    first = pid_s * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(V, BLOCK_V))
    for block in range(first, last):
        offs_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        weight_rows = weight_ptr + offs_v.to(tl.int64)[None, :] * stride_wv
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for start in range(0, D, BLOCK_D):
            mask_d = start + offs_d < D
            h = tl.load(
                hidden_rows + (start + offs_d)[None, :] * stride_hd,
                mask=mask_m[:, None] & mask_d[None, :], other=0.0,
            )  # fmt: skip
            w = tl.load(
                weight_rows + (start + offs_d)[:, None] * stride_wd,
                mask=mask_d[:, None] & mask_v[None, :], other=0.0,
            )  # fmt: skip
            acc = tl.dot(h, w, acc, input_precision="ieee" if IEEE else "tf32")
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0)[None, :]
        total += tl.sum(tl.where(mask_v[None, :], acc, 0.0), axis=1)
        picked += tl.sum(tl.where(offs_v[None, :] == target[:, None], acc, 0.0), axis=1)
        z = tl.where(mask_v[None, :], acc, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(z, axis=1))
        l_i = l_i * tl.exp(m_i - m_new) + tl.sum(tl.exp(z - m_new[:, None]), axis=1)
        m_i = m_new
    at = pid_s.to(tl.int64) * M + offs_m
    tl.store(m_ptr + at, m_i, mask=mask_m)
    tl.store(l_ptr + at, l_i, mask=mask_m)
    tl.store(picked_ptr + at, picked, mask=mask_m)
    tl.store(total_ptr + at, total, mask=mask_m)


def linear_cross_entropy_pass(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    exact: Tensor | None,
    teacher_logits: Tensor | None,
    teacher_bias: Tensor | None,
    label_smoothing: float,
    alpha: float,
    ignore_index: int,
    write_grad: bool,
    loss: Tensor,
) -> None:
    """Losses (M,), and softmax(z) - t in place of logits (M, V): `Passes.softmax` of the op."""
    num_rows, vocab = logits.shape
    if num_rows == 0:
        return
    has_teacher = teacher_logits is not None
    _linear_cross_entropy_pass_kernel[(num_rows,)](
        logits, bias, target, exact, teacher_logits, teacher_bias, loss,
        vocab, logits.stride(0), teacher_logits.stride(0) if has_teacher else 0, ignore_index,
        (1 - alpha) * (1 - label_smoothing), (1 - alpha) * label_smoothing / vocab, alpha,
        HAS_BIAS=bias is not None, HAS_EXACT=exact is not None, HAS_TEACHER=has_teacher,
        HAS_TEACHER_BIAS=teacher_bias is not None, WRITE_GRAD=write_grad,
        BLOCK_V=min(_BLOCK_V, triton.next_power_of_2(vocab)), num_warps=_NUM_WARPS,
    )  # fmt: skip


def linear_cross_entropy_bias_grad(dlogits: Tensor, scale: Tensor, out: Tensor) -> None:
    """out (V,) = sum over rows i, in a fixed order, of scale_i dlogits_i."""
    num_rows, vocab = dlogits.shape
    _linear_cross_entropy_bias_grad_kernel[(triton.cdiv(vocab, _SUM_COLS),)](
        dlogits, scale, out, num_rows, vocab, dlogits.stride(0),
        BLOCK_M=_SUM_ROWS, BLOCK_V=_SUM_COLS,
    )  # fmt: skip


def _fwd_blocks(dtype: torch.dtype) -> dict[str, int]:
    """Tile, warps and stages: fp32 without tensor cores needs registers for its operands."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_V": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_V": 64, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}


def linear_cross_entropy_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """Losses (M,) of hidden (M, D), weight (V, D) of one dtype; logits never reach memory.

    Each program has some rows and a part of the vocabulary; the parts are merged in their order.
    """
    num_rows, vocab = hidden.shape[0], weight.shape[0]
    blocks = _fwd_blocks(hidden.dtype)
    num_row_blocks = triton.cdiv(num_rows, blocks["BLOCK_M"])
    num_blocks = triton.cdiv(vocab, blocks["BLOCK_V"])
    num_splits = max(1, min(num_blocks, _PROGRAMS // max(1, num_row_blocks)))
    parts = torch.empty(4, num_splits, num_rows, device=hidden.device, dtype=torch.float32)
    if num_rows > 0:
        _linear_cross_entropy_fwd_kernel[(num_row_blocks, num_splits)](
            hidden, weight, bias, target, *parts,
            num_rows, vocab, hidden.shape[1], triton.cdiv(num_blocks, num_splits),
            *hidden.stride(), *weight.stride(),
            HAS_BIAS=bias is not None, IEEE=hidden.dtype == torch.float32, **blocks,
        )  # fmt: skip
    top, exps, picked, total = parts
    lse = torch.logsumexp(top + exps.log(), 0)
    mean = total.sum(0) / vocab
    loss = lse - (1 - label_smoothing) * picked.sum(0) - label_smoothing * mean
    loss = loss.masked_fill((target < 0) | (target >= vocab), float("nan"))
    return loss.masked_fill(target == ignore_index, 0)


def _pass_case(dtype: str, has_teacher: bool, max_registers: int) -> AotCase:
    # As the launcher leaves out what is None.
    optional = {"bias_ptr": "*fp32"}
    if dtype == "bf16":
        optional["exact_ptr"] = "*fp32"
    if has_teacher:
        optional |= {"teacher_ptr": f"*{dtype}", "teacher_bias_ptr": "*fp32"}
    pointers = ("bias_ptr", "exact_ptr", "teacher_ptr", "teacher_bias_ptr")
    return AotCase(
        name=f"linear_cross_entropy-pass-{dtype}{'-teacher' if has_teacher else ''}",
        kernel=_linear_cross_entropy_pass_kernel,
        types={
            "logits_ptr": f"*{dtype}",
            "target_ptr": "*i64",
            "loss_ptr": "*fp32",
            **optional,
            **dict.fromkeys(("V", "stride_lm", "stride_tm", "ignore_index"), "i32"),
            **dict.fromkeys(("hard", "smooth", "alpha"), "fp32"),
        },
        constants={
            **{name: None for name in pointers if name not in optional},
            "HAS_BIAS": True,
            "HAS_EXACT": dtype == "bf16",
            "HAS_TEACHER": has_teacher,
            "HAS_TEACHER_BIAS": has_teacher,
            "WRITE_GRAD": True,
            "BLOCK_V": _BLOCK_V,
        },
        num_warps=_NUM_WARPS,
        max_registers=max_registers,
        max_shared_bytes=8192,
    )


def _bias_grad_case(dtype: str) -> AotCase:
    return AotCase(
        name=f"linear_cross_entropy-bias_grad-{dtype}",
        kernel=_linear_cross_entropy_bias_grad_kernel,
        types={
            "dlogits_ptr": f"*{dtype}",
            "scale_ptr": "*fp32",
            "out_ptr": "*fp32",
            "M": "i32",
            "V": "i32",
            "stride_gm": "i32",
        },
        constants={"BLOCK_M": _SUM_ROWS, "BLOCK_V": _SUM_COLS},
        max_registers=128,
        max_shared_bytes=16_384,
    )


def _fwd_case(dtype: str, torch_dtype: torch.dtype, max_registers: int) -> AotCase:
    blocks = _fwd_blocks(torch_dtype)
    num_warps, num_stages = blocks.pop("num_warps"), blocks.pop("num_stages")
    strides = ("stride_hm", "stride_wv")
    return AotCase(
        name=f"linear_cross_entropy-fwd-{dtype}",
        kernel=_linear_cross_entropy_fwd_kernel,
        types={
            "hidden_ptr": f"*{dtype}",
            "weight_ptr": f"*{dtype}",
            "bias_ptr": "*fp32",
            "target_ptr": "*i64",
            "m_ptr": "*fp32",
            "l_ptr": "*fp32",
            "picked_ptr": "*fp32",
            "total_ptr": "*fp32",
            **dict.fromkeys(("M", "V", "D", "blocks_per_split", *strides), "i32"),
        },
        # Last dimensions are contiguous, which the launcher's specialisation on 1 says as well.
        constants={
            "stride_hd": 1,
            "stride_wd": 1,
            "HAS_BIAS": True,
            "IEEE": torch_dtype == torch.float32,
            **blocks,
        },
        divisible=("D", *strides),
        num_warps=num_warps,
        num_stages=num_stages,
        max_registers=max_registers,
        instructions={} if torch_dtype == torch.float32 else {80: ("HMMA",), 90: ("HGMMA",)},
    )


AOT_CASES = [
    _pass_case("bf16", has_teacher=False, max_registers=128),
    _pass_case("bf16", has_teacher=True, max_registers=168),
    _pass_case("fp32", has_teacher=True, max_registers=168),
    _bias_grad_case("bf16"),
    _bias_grad_case("fp32"),
    _fwd_case("bf16", torch.bfloat16, max_registers=208),
    _fwd_case("fp32", torch.float32, max_registers=160),
]
