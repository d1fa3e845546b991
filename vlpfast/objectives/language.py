"""Losses on words."""

from __future__ import annotations

import torch

from vlpfast.objectives.passes import Loss, Passes, teacher_fused
from vlpfast.objectives.plan import Rows
from vlpfast.ops.linear_cross_entropy import linear_cross_entropy


def mlm(passes: Passes) -> Loss:
    """Masked language modelling: cross-entropy at masked positions only, mixed with the teacher's
    distribution there.
    """
    fused, labels = passes.fused.text, passes.batch.mlm_labels
    start = fused.cu_seqlens[passes.plan.first_sequence(Rows.MASKED, len(passes.batch))]
    masked = (labels != -100).nonzero().squeeze(1)
    target = labels[masked]
    distillation = {}
    if passes.teacher is not None and passes.alpha > 0:
        with torch.no_grad():
            hidden = teacher_fused(passes).values[masked]
            distillation = {
                "teacher": passes.teacher.model.token_head_inputs(hidden),
                "alpha": passes.alpha,
            }
    hidden, weight, bias = passes.model.token_head_inputs(fused.values[start + masked])
    loss = linear_cross_entropy(hidden, weight, target, bias, reduction="sum", **distillation)
    return loss, torch.tensor(target.shape[0], device=loss.device)
