"""Losses on words."""

from __future__ import annotations

import torch
from torch import Tensor

from vlpfast.objectives.passes import Loss, Passes, teacher_fused
from vlpfast.objectives.plan import Rows
from vlpfast.ops.linear_cross_entropy import linear_cross_entropy


def mlm(passes: Passes) -> Loss:
    """Masked language modelling: cross-entropy at masked positions only, mixed with the teacher's
    distribution there.
    """
    labels, distillation = passes.batch.mlm_labels, {}
    masked = (labels != -100).nonzero().squeeze(1)
    if passes.teacher is not None and passes.alpha > 0:
        with torch.no_grad():
            hidden = teacher_fused(passes).values[masked]
            distillation = {
                "teacher": passes.teacher.model.token_head_inputs(hidden),
                "alpha": passes.alpha,
            }
    return _word_loss(passes, Rows.MASKED, masked, labels[masked], **distillation)


def mtm(passes: Passes) -> Loss:
    """Masked text modelling: the same on texts alone."""
    labels = passes.batch.alone_labels
    masked = (labels != -100).nonzero().squeeze(1)
    return _word_loss(passes, Rows.MASKED_TEXT_ALONE, masked, labels[masked])


def _word_loss(passes: Passes, rows: Rows, places: Tensor, target: Tensor, **options) -> Loss:
    """Cross-entropy with the ids `target` (n,) at `places` (n,) of the texts of `rows`."""
    fused = passes.fused.text
    start = fused.cu_seqlens[passes.plan.first_sequence(rows, len(passes.batch))]
    hidden, weight, bias = passes.model.token_head_inputs(fused.values[start + places])
    loss = linear_cross_entropy(hidden, weight, target, bias, reduction="sum", **options)
    return loss, torch.tensor(target.shape[0], device=loss.device)
