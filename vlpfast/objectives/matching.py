"""Image-text matching: with hard negatives, or with random ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.data.batch import Batch
from vlpfast.objectives.passes import Loss, Passes
from vlpfast.ops.reference.counter import draw, stream, uniform
from vlpfast.ops.seed import fold_seed


def itm(passes: Passes, hard_text: Tensor | None, hard_image: Tensor | None) -> Loss:
    """Whether text and image belong together, of the rows of the plan that matching has: they are
    its first. `metrics` gets their accuracy.
    """
    size = len(passes.batch)
    rows = size if passes.mixed_image is not None else 3 * size
    logits = passes.model.match(passes.fused, rows)
    if passes.mixed_image is not None:
        loss, right = pair_loss(logits, matched_pairs(passes))
    else:
        loss, right = matching_loss(logits, hard_text, hard_image)
    passes.metrics["itm_accuracy"] = right / loss[1]
    return loss


def matched_pairs(passes: Passes) -> Tensor:
    """(B,) bool: where random matching shows a text's own image."""
    ids = passes.batch.image_ids
    return ids[passes.mixed_image] == ids


def qa(passes: Passes) -> Loss:
    """Which answer is that of the question that the text is, from the pooled first token: its
    cross-entropy over the texts that have one and are shown their own image. `metrics` gets their
    accuracy.

    Source: Tan & Bansal 2019 (LXMERT), section 3.1.3, arXiv:1908.07490; airsplay/lxmert
    src/pretrain/lxmert_pretrain.py, `convert_example_to_features`.
    """
    labels = passes.batch.answer_ids
    if labels is None:
        raise ValueError("objectives.qa needs questions with answers: set data.tasks, data.answers")
    if passes.mixed_image is not None:
        labels = torch.where(matched_pairs(passes), labels, -100)
    logits = passes.model.answer_logits(passes.model.first_tokens(passes.fused)[0])
    asked = labels != -100
    right = (logits.argmax(1) == labels).sum()
    passes.metrics["qa_accuracy"] = right / asked.sum().clamp(min=1)
    return F.cross_entropy(logits, labels, reduction="sum"), asked.sum()


def mixed_images(batch: Batch, seed: int) -> Tensor:
    """(B,) the image that random matching shows with each text: its own, or for half of them any
    other of the batch (UNITER, ViLT), which is still a match where both show the same.
    """
    size = len(batch)
    keys = stream(fold_seed(seed, 2), batch.positions)
    own = torch.arange(size, device=keys.device)
    shift = 1 + ((draw(keys, torch.zeros_like(own)) * (size - 1)) >> 32)
    swapped = uniform(draw(keys, torch.ones_like(own))) < 0.5
    return torch.where(swapped, (own + shift) % size, own)


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
