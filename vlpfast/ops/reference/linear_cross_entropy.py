"""Eager linear + cross-entropy: the logits of the kept rows, plainly."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *,
    label_smoothing: float,
    teacher: tuple[Tensor, Tensor, Tensor | None] | None,
    alpha: float,
) -> Tensor:
    """Loss (N,) of rows `hidden` (N, D), none of which is ignored, in fp32 or wider."""
    log_p = _logits(hidden, weight, bias).log_softmax(1)
    loss = -log_p.gather(1, target[:, None]).squeeze(1)
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(1)
    if teacher is not None:
        with torch.no_grad():
            soft = _logits(*teacher).softmax(1)
        loss = (1 - alpha) * loss - alpha * (soft * log_p).sum(1)
    return loss


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product in the wider dtype of its factors, everything after it in fp32 or wider."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    return logits if bias is None else logits + bias
