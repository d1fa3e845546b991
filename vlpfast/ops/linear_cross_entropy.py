"""Projection to a vocabulary and cross-entropy in one op: MLM, LM, captioning, distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from vlpfast.ops._dispatch import reference_only
from vlpfast.ops.reference import linear_cross_entropy as reference

_OP = reference_only("linear_cross_entropy", reference.linear_cross_entropy)

Teacher = tuple[Tensor, Tensor, Tensor | None]


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
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of the logits hidden @ weight.T + bias; ignored rows never meet the weight.

        log_p_i = log_softmax(weight @ hidden_i + bias)            V entries
        hard_i  = -(1 - label_smoothing) * log_p_i[target_i] - label_smoothing * mean_v log_p_iv
        soft_i  = -sum_v softmax(weight_m @ hidden_m_i + bias_m)_v * log_p_iv
        loss_i  = hard_i                                           without a teacher
        loss_i  = (1 - alpha) * hard_i + alpha * soft_i            with one

    Args:
        hidden (..., D): fp32/bf16/fp16/fp64.
        weight (V, D): the output embedding; read in fp32 if `hidden` is not fp64.
        target (...): int64 in [0, V), or ignore_index (which may itself lie in [0, V)).
        bias (V,): or None.
        ignore_index: rows with this target have loss 0 and are not counted.
        label_smoothing: in [0, 1).
        teacher: (hidden_m (..., D_m), weight_m (V, D_m), bias_m (V,) or None), not differentiated.
        alpha: the teacher's share in [0, 1].
        reduction: "mean" over rows that are not ignored, "sum", or "none".
        impl: "auto" or "reference".

    Returns:
        scalar, or target's shape for "none"; fp32 (fp64 for fp64 inputs). Where every row is
        ignored the mean is 0 with zero gradients (torch gives NaN), so that a batch without a
        masked token, or a rank without one, does no harm.

    Source: Devlin et al. 2019 (BERT), arXiv:1810.04805; distillation: Li et al. 2021 (ALBEF),
        eq. 7, arXiv:2107.07651, as in its code (soft labels enter by cross-entropy, which differs
        from the paper's KL by a constant); smoothing as torch.nn.functional.cross_entropy.
    """
    _check(hidden, weight, target, bias, label_smoothing, reduction)
    _check_teacher(teacher, alpha, target, weight)
    run = _OP.choose(impl, hidden.device, dtype=hidden.dtype, shape=hidden.shape)

    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    flat = target.reshape(-1)
    kept = (flat != ignore_index).nonzero().squeeze(1)
    if teacher is not None:
        hidden_m, weight_m, bias_m = teacher
        teacher = (
            hidden_m.detach().reshape(-1, hidden_m.shape[-1])[kept].to(dtype),
            weight_m.detach().to(dtype),
            None if bias_m is None else bias_m.detach().to(dtype),
        )
    with torch.autocast(hidden.device.type, enabled=False):
        loss = run(
            hidden.reshape(-1, hidden.shape[-1])[kept].to(dtype),
            weight.to(dtype),
            flat[kept],
            None if bias is None else bias.to(dtype),
            label_smoothing=label_smoothing,
            teacher=teacher,
            alpha=alpha,
        )
    if reduction == "none":
        return loss.new_zeros(flat.shape[0]).index_copy(0, kept, loss).reshape(target.shape)
    return loss.sum() / max(1, kept.shape[0]) if reduction == "mean" else loss.sum()


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
    hidden_m, weight_m, bias_m = teacher
    if hidden_m.shape[:-1] != target.shape:
        raise ValueError(
            f"teacher[0] must be {(*target.shape, 'D_m')}, got {tuple(hidden_m.shape)}"
        )
    _check_weight("teacher[1]", weight_m, "teacher[2]", bias_m, hidden_m)
    if weight_m.shape[0] != weight.shape[0]:
        raise ValueError(
            f"teacher[1] must have weight's V={weight.shape[0]} rows, got {weight_m.shape[0]}"
        )
