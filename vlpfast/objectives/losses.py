"""Losses of a step as sums and counts, so that a loop can average over ranks and accumulation steps
exactly.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops._collectives import gather_rows
from vlpfast.ops.contrastive import hinge_loss

Loss = tuple[Tensor, Tensor]


def pair_loss(logits: Tensor, matched: Tensor) -> tuple[Loss, Tensor]:
    """Cross-entropy of image-text matching over R rows of known label (R,) bool; logits (R, 2).

    Returns: (sum, count) and the number of rows that are classified rightly.
    """
    labels = matched.long()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    right = (logits.argmax(1) == labels).sum()
    return (loss, torch.tensor(len(labels), device=loss.device)), right


def matching_loss(logits: Tensor, hard_text: Tensor, hard_image: Tensor) -> tuple[Loss, Tensor]:
    """Cross-entropy of image-text matching over B matched rows, B with a hard image and B with a
    hard text.

    Args:
        logits (3B, 2): `VLPModel.match` of the rows in that order; index 1 is "match".
        hard_text, hard_image (B,): the negatives drawn; rows whose negative is -1 (none exists) do
            not count.

    Returns:
        (sum, count) and the number of counted rows that are classified rightly.

    Source: Li et al. 2021 (ALBEF), arXiv:2107.07651, eq. (4) and section 3.2.
    """
    batch_size = hard_text.shape[0]
    labels = torch.zeros(3 * batch_size, dtype=torch.int64, device=logits.device)
    labels[:batch_size] = 1
    counted = torch.cat(
        [torch.ones_like(hard_image, dtype=torch.bool), hard_image >= 0, hard_text >= 0]
    )
    loss = (F.cross_entropy(logits, labels, reduction="none") * counted).sum()
    right = ((logits.argmax(1) == labels) & counted).sum()
    return (loss, counted.sum()), right


def hinge(
    image: Tensor,
    text: Tensor,
    ids: Tensor,
    *,
    margin: float,
    hardest: bool,
    group: dist.ProcessGroup | None,
) -> Loss:
    """`ops.hinge_loss` of the pairs of all ranks, a sum over all of them, as (sum, 1).

    Every rank computes all of it; the mean over ranks of its gradient is that of one process on
    the concatenated batch.

    Args:
        image, text (B, E): this rank's embeddings, L2-normalised; B is the same on every rank.
        ids (B,): pairs with equal ids are no negatives of each other.
        margin, hardest: as `ops.hinge_loss`.
        group: the ranks, or None.
    """
    if group is not None:
        counts = [image.shape[0]] * dist.get_world_size(group)
        image, text, ids = (gather_rows(rows, counts, group) for rows in (image, text, ids))
    loss = hinge_loss(image, text, margin=margin, hardest=hardest, ids=ids)
    return loss, torch.ones((), device=loss.device)
