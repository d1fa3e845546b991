"""Image-text matching: with hard negatives, or with random ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.data.batch import Batch
from vlpfast.objectives.passes import Loss, Passes
from vlpfast.objectives.table import Rows
from vlpfast.ops.reference.counter import draw, stream, uniform
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged


def itm(passes: Passes) -> Loss:
    """Whether text and image belong together, of the rows of the plan that matching has: they are
    its first. `metrics` gets their accuracy.
    """
    size = len(passes.batch)
    rows = size if passes.mixed_image is not None else 3 * size
    logits = passes.model.match(passes.fused, rows)
    if passes.mixed_image is not None:
        loss, right = pair_loss(logits, matched_pairs(passes))
    else:
        loss, right = matching_loss(logits, passes.hard_text, passes.hard_image)
    passes.metrics["itm_accuracy"] = right / loss[1]
    return loss


def matched_pairs(passes: Passes) -> Tensor:
    """(B,) bool: where random matching shows a text's own image."""
    ids = passes.batch.image_ids
    return ids[passes.mixed_image] == ids


def qa(passes: Passes) -> Loss:
    """Which answer is that of the question that the text is, from what matching reads of the row:
    `qa_targets` "one" is its cross-entropy, over the texts that have one and are shown their own
    image; "scores" is `score_loss`. `metrics` gets their accuracy.

    Source: Tan & Bansal 2019 (LXMERT), section 3.1.3, arXiv:1908.07490; airsplay/lxmert
    src/pretrain/lxmert_pretrain.py, `convert_example_to_features`.
    """
    batch, plan, model, size = passes.batch, passes.plan, passes.model, len(passes.batch)
    labels, told = batch.answer_ids, batch.answer_sets
    if labels is None or (told is None and passes.config.qa_targets == "scores"):
        raise ValueError("objectives.qa needs questions with answers: set data.tasks, data.answers")
    first = 0 if plan.together else plan.first_sequence(Rows.MATCHED, size)
    rows = slice(first, first + size * model.config.answer_images)
    read = (None if t is None else t[rows] for t in model.first_tokens(passes.fused))
    logits = model.answer_logits(*read)
    shown = torch.ones_like(labels, dtype=torch.bool)
    if plan.together and passes.mixed_image is not None:
        shown = matched_pairs(passes)
    if passes.config.qa_targets == "scores":
        loss, right = score_loss(logits, told, batch.answer_scores, shown)
    else:
        labels = torch.where(shown, labels, -100)
        loss = F.cross_entropy(logits, labels, reduction="sum"), (labels != -100).sum()
        right = (logits.argmax(1) == labels).sum()
    passes.metrics["qa_accuracy"] = right / loss[1].clamp(min=1)
    return loss


def score_loss(logits: Tensor, told: Ragged, scores: Tensor, shown: Tensor) -> tuple[Loss, Tensor]:
    """Binary cross-entropy of every answer with its score, summed over the answers: the mean over
    answers times their number, as VQA is fine-tuned.

    -log p of score t is softplus(x) - t x: answers of score 0 need no target.

    Args:
        logits (R, A): of R questions.
        told: packed int64 numbers of each question's answers.
        scores (n,): of these, in [0, 1].
        shown (R,): bool, rows that count, if they have an answer at all.

    Returns:
        (sum, count) and the sum of the scores of the likeliest answers.

    Source: Chen et al. 2020 (UNITER), appendix A.2; dandelin/ViLT
        vilt/modules/objectives.py, `compute_vqa`.
    """
    rows, counted = told.row_ids(), shown & (told.lens > 0)
    chosen = counted[rows]
    at = scores.to(logits.dtype) * chosen
    loss = F.softplus(logits).sum(1) @ counted.to(logits.dtype) - at @ logits[rows, told.values]
    right = (at * (logits.argmax(1)[rows] == told.values)).sum()
    return (loss, counted.sum()), right


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
