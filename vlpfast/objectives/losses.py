"""Losses of a step as sums and counts, so that a loop can average over ranks and accumulation steps
exactly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
