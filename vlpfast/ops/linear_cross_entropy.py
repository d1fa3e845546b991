"""Projection to a vocabulary and cross-entropy in one op: MLM, LM, captioning, distillation.

Checks, reductions and the choice of implementation are here; `_linear_cross_entropy_chunked.py`
computes, `_linear_cross_entropy_autograd.py` differentiates.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vlpfast import _ext
from vlpfast.ops._checks import check_devices, check_integers
from vlpfast.ops._dispatch import Implementation, Op
from vlpfast.ops._linear_cross_entropy_autograd import row_losses
from vlpfast.ops._linear_cross_entropy_chunked import Head, Options
from vlpfast.ops.reference import linear_cross_entropy as reference

Teacher = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]


def _reference(
    student: Head,
    teacher: Head | None,
    target: Tensor,
    *,
    label_smoothing: float,
    alpha: float,
    ignore_index: int,
    max_rows: int | None,
    uniform: bool,
) -> Tensor:
    """Losses (N,) by eager code, in which the number of kept rows is a shape."""
    kept = (target != ignore_index).nonzero().squeeze(1)
    loss = reference.linear_cross_entropy(
        student.hidden[kept],
        student.weight,
        target[kept],
        student.bias,
        label_smoothing=label_smoothing,
        teacher=None if teacher is None else (teacher.hidden[kept], *teacher[1:]),
        alpha=alpha,
    )
    return loss.new_zeros(target.shape).index_copy(0, kept, loss)


def _fast(
    student: Head, teacher: Head | None, target: Tensor, *, impl: str, **options: object
) -> Tensor:
    return row_losses(student, teacher, target, Options(impl, **options))


def _cpp_rejects(*, device: torch.device, dtypes: set[torch.dtype]) -> str | None:
    return _ext.cpp_rejects(device) or _dtypes_rejected(dtypes, torch.float32, torch.bfloat16)


def _triton_rejects(*, device: torch.device, dtypes: set[torch.dtype]) -> str | None:
    takes = (torch.float32, torch.bfloat16, torch.float16)
    return _ext.triton_rejects(device) or _dtypes_rejected(dtypes, *takes)


def _dtypes_rejected(dtypes: set[torch.dtype], *takes: torch.dtype) -> str | None:
    rejected = sorted(str(dtype) for dtype in dtypes - set(takes))
    return f"makes logits in {[str(t) for t in takes]}, got {rejected}" if rejected else None


_OP = Op(
    "linear_cross_entropy",
    {
        "reference": Implementation(_reference),
        "cpp": Implementation(functools.partial(_fast, impl="cpp"), _ext.cpp_missing, _cpp_rejects),
        "triton": Implementation(
            functools.partial(_fast, impl="triton"), _ext.triton_missing, _triton_rejects
        ),
    },
    auto={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    teacher: Teacher | None = None,
    alpha: float = 0.0,
    reduction: str = "mean",
    max_rows: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of the logits hidden @ weight.T + bias; ignored rows never meet the weight.

        log_p_i = log_softmax(weight @ hidden_i + bias)            V entries
        hard_i  = -(1 - label_smoothing) * log_p_i[target_i] - label_smoothing * mean_v log_p_iv
        soft_i  = -sum_v softmax(weight_m @ hidden_m_i + bias_m)_v * log_p_iv
        loss_i  = hard_i                                           without a teacher
        loss_i  = (1 - alpha) * hard_i + alpha * soft_i            with one

    Logits exist for a chunk of rows at a time, 256 MiB of them (the teacher's as well), and become
    their own gradient in place. Kept for the backward is that gradient, if one chunk holds all
    rows; else, for "mean" and "sum", the gradients of hidden, weight and bias; else, for "none",
    the inputs, and logits are computed again. Under torch.compile the second also replaces the
    first. Gradients that nobody asks for are not computed. Same inputs, same bits.

    Precision: weight @ hidden is made in the wider of the two dtypes, as a linear layer's product
    (bf16 logits of bf16 inputs; autocast changes nothing); bias, softmax, losses and sums over
    chunks are fp32. Among bf16 logits that of the target is not rounded.

    Args:
        hidden (..., D): fp32/bf16/fp16/fp64.
        weight (V, D): the output embedding. It is converted only where `hidden` is wider.
        target (...): int64 in [0, V), or ignore_index (which may itself lie in [0, V)). Anything
            else is an IndexError or RuntimeError on the CPU; on a GPU the row's loss and gradients
            are NaN, because nobody waits for the device to say so.
        bias (V,): or None.
        ignore_index: rows with this target have loss 0 and are not counted.
        label_smoothing: in [0, 1).
        teacher: (hidden_m (..., D_m), weight_m (V, D_m), bias_m (V,) or None), not differentiated.
            The bias may be left out.
        alpha: the teacher's share in [0, 1].
        reduction: "mean" over rows that are not ignored, "sum", or "none".
        max_rows: upper bound, known on the host, of the number of rows that are not ignored. Work
            is done for so many rows, and the host never waits for a GPU; without it the host reads
            from the device how many rows are kept, once a call. More kept rows than this are a
            RuntimeError on the CPU, a device-side assertion on a GPU. The reference ignores it.
        impl: "auto", "reference", "cpp" or "triton".

    Returns:
        scalar, or target's shape for "none"; fp32 (fp64 for fp64 inputs). Where every row is
        ignored the mean is 0 with zero gradients (torch gives NaN), so that a batch without a
        masked token, or a rank without one, does no harm.

    Source: Devlin et al. 2019 (BERT), arXiv:1810.04805; distillation: Li et al. 2021 (ALBEF),
        eq. 7, arXiv:2107.07651, as in its code (soft labels enter by cross-entropy, which differs
        from the paper's KL by a constant); smoothing as torch.nn.functional.cross_entropy.
    """
    _check(hidden, weight, target, bias, label_smoothing, reduction)
    if teacher is not None and len(teacher) == 2:
        teacher = (*teacher, None)
    _check_teacher(teacher, alpha, target, weight)
    check_integers(max_rows=max_rows)
    if max_rows is not None and max_rows < 0:
        raise ValueError(f"max_rows must be >= 0, got {max_rows}")
    dtypes = {torch.promote_types(hidden.dtype, weight.dtype)}
    flat = target.reshape(-1)
    student, teacher_head = Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias), None
    if teacher is not None and alpha > 0:
        hidden_m, weight_m, bias_m = (None if x is None else x.detach() for x in teacher)
        teacher_head = Head(hidden_m.reshape(-1, hidden_m.shape[-1]), weight_m, bias_m)
        dtypes.add(torch.promote_types(hidden_m.dtype, weight_m.dtype))
    run = _OP.choose(impl, hidden.device, dtypes=dtypes)
    with torch.autocast(hidden.device.type, enabled=False):
        loss = run(
            student,
            teacher_head,
            flat,
            label_smoothing=label_smoothing,
            alpha=0.0 if teacher_head is None else alpha,
            ignore_index=ignore_index,
            max_rows=max_rows,
            uniform=reduction != "none",
        )
    if reduction == "none":
        return loss.reshape(target.shape)
    loss = loss.sum()
    return loss / (flat != ignore_index).sum().clamp(min=1) if reduction == "mean" else loss


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    reduction: str,
) -> None:
    if not hidden.is_floating_point():
        raise TypeError(f"hidden must be floating point, got {hidden.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target must be hidden's shape without its last dimension, {tuple(hidden.shape[:-1])},"
            f" got {tuple(target.shape)}"
        )
    _check_weight("weight", weight, "bias", bias, hidden)
    check_devices(hidden.device, target=target, weight=weight, bias=bias)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _check_weight(
    weight_name: str, weight: Tensor, bias_name: str, bias: Tensor | None, hidden: Tensor
) -> None:
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name} must be (V, D={hidden.shape[-1]}), got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{bias_name} must be (V,) = ({weight.shape[0]},), got {tuple(bias.shape)}"
        )


def _check_teacher(teacher: Teacher | None, alpha: float, target: Tensor, weight: Tensor) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if teacher is None:
        if alpha > 0:
            raise ValueError(f"alpha={alpha} needs a teacher, got None")
        return
    if len(teacher) != 3:
        expected = "(hidden_m, weight_m) or (hidden_m, weight_m, bias_m)"
        raise ValueError(f"teacher must be {expected}, got {len(teacher)} entries")
    hidden_m, weight_m, bias_m = teacher
    if hidden_m.shape[:-1] != target.shape:
        raise ValueError(
            f"teacher[0] must be {(*target.shape, 'D_m')}, got {tuple(hidden_m.shape)}"
        )
    _check_weight("teacher[1]", weight_m, "teacher[2]", bias_m, hidden_m)
    given = {f"teacher[{i}]": x for i, x in enumerate(teacher)}
    check_devices(target.device, **given)
    if weight_m.shape[0] != weight.shape[0]:
        raise ValueError(
            f"teacher[1] must have weight's V={weight.shape[0]} rows, got {weight_m.shape[0]}"
        )
