"""Eager contrastive losses: the whole similarity matrix, plainly. Checks, communication between
ranks and means over the batch belong to vlpfast/ops/contrastive.py.

Letters: C = number of candidates of a direction = in-batch candidates (G) + queue keys (K).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops.reference import counter


class Rows(NamedTuple):
    """What `contrastive` computes for each row: loss (B,), log-sum-exp (B,) or None, negatives."""

    image_loss: Tensor
    text_loss: Tensor
    image_lse: Tensor | None
    text_lse: Tensor | None
    hard_text: Tensor
    hard_image: Tensor


def contrastive(
    image: Tensor,
    text: Tensor,
    image_batch: Tensor,
    text_batch: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    kind: str,
    batch_ids: Tensor,
    first_row: int,
    label_smoothing: float,
    image_keys: Tensor | None,
    text_keys: Tensor | None,
    key_ids: Tensor | None,
    teacher: tuple[Tensor, Tensor] | None,
    alpha: float,
    hard_negatives: int,
    seed: int | Tensor,
) -> Rows:
    """Both directions for this rank's rows (B, D) against the in-batch candidates (G, D) and keys.

    `batch_ids` (G,) are the ids of the in-batch candidates; this rank's rows are those from
    `first_row` on. The other arguments are `vlpfast.ops.contrastive_loss`'s.
    """
    local = slice(first_row, first_row + image.shape[0])
    ids = batch_ids[local]
    losses, lses, negatives = [], [], []
    for side, (query, batch, keys) in enumerate(
        [(image, text_batch, text_keys), (text, image_batch, image_keys)]
    ):
        positive = ids[:, None] == batch_ids
        if keys is not None:
            batch = torch.cat([batch, keys])
            no_keys = positive.new_zeros(query.shape[0], keys.shape[0])
            key_positive = no_keys if key_ids is None else ids[:, None] == key_ids
            positive = torch.cat([positive, key_positive], dim=1)
        logits = _logits(query, batch, scale, bias)
        with torch.no_grad():
            target = _targets(positive, kind, label_smoothing, logits.dtype)
            if teacher is not None:
                teacher_logits = _logits(teacher[side], batch, scale, bias)
                soft = teacher_logits.softmax(1) if kind == "softmax" else teacher_logits.sigmoid()
                target = alpha * soft + (1 - alpha) * target
            lses.append(logits.logsumexp(1) if kind == "softmax" else None)
            negatives.append(
                _draw_negatives(
                    logits[:, local],
                    positive[:, local],
                    hard_negatives,
                    seed,
                    # One stream per row and direction, whatever rank holds the row.
                    2 * torch.arange(local.start, local.stop, device=image.device) + side,
                )
            )
        if kind == "softmax":
            log_p = target * logits.log_softmax(1)
        else:
            log_p = target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)
        losses.append(-log_p.sum(1))
    return Rows(*losses, *lses, *negatives)


def hinge(image: Tensor, text: Tensor, ids: Tensor, *, margin: float, hardest: bool) -> Tensor:
    """Sum over the batch of the hinge losses of both directions; ids (B,), equal ones cost 0."""
    sim = image @ text.T
    pair = sim.diagonal()
    same = ids[:, None] == ids
    text_cost = (margin + sim - pair[:, None]).clamp(min=0).masked_fill(same, 0)
    image_cost = (margin + sim - pair).clamp(min=0).masked_fill(same, 0)
    if hardest and sim.shape[0] > 0:
        return text_cost.max(1).values.sum() + image_cost.max(0).values.sum()
    return text_cost.sum() + image_cost.sum()


def _logits(query: Tensor, candidates: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    logits = scale * (query @ candidates.T)
    return logits if bias is None else logits + bias


def _targets(positive: Tensor, kind: str, label_smoothing: float, dtype: torch.dtype) -> Tensor:
    """Smoothed hard targets (B, C): over candidates for softmax, yes or no for sigmoid."""
    target = positive.to(dtype)
    if kind == "softmax":
        target = target / target.sum(1, keepdim=True)
    num_classes = positive.shape[1] if kind == "softmax" else 2
    return (1 - label_smoothing) * target + label_smoothing / max(1, num_classes)


def _draw_negatives(
    logits: Tensor, positive: Tensor, num_negatives: int, seed: int | Tensor, row_ids: Tensor
) -> Tensor:
    """(B, k) columns of logits (B, B) drawn from their softmax without replacement, by Gumbel-max.

    Columns marked in `positive` (B, B) are never drawn; -1 where no other is left.
    """
    columns = torch.arange(logits.shape[1], device=logits.device)
    bits = counter.draw(counter.stream(seed, row_ids)[:, None], columns)
    # 23 bits and a half: u is neither 0 nor 1 in fp32, so the noise is finite.
    u = ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23
    noisy = (logits - (-u.log()).log()).masked_fill(positive, -torch.inf)
    score, drawn = noisy.topk(min(num_negatives, logits.shape[1]), dim=1)
    drawn = torch.where(score == -torch.inf, -1, drawn)
    return F.pad(drawn, (0, num_negatives - drawn.shape[1]), value=-1)
