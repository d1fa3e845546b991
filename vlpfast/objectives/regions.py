"""Losses on regions: transport between words and regions, and what hidden regions were."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.objectives.matching import matched_pairs
from vlpfast.objectives.passes import Loss, Passes
from vlpfast.objectives.plan import Rows
from vlpfast.ops.transport import wra_loss
from vlpfast.ragged import Ragged

AlignedTokens = Literal["all", "inner"]
# Of a detector's classes.
BACKGROUND = 0


def wra(passes: Passes) -> Loss:
    """Word-region alignment of the rows of random matching."""
    matched = matched_pairs(passes)
    rows = passes.plan.sequences(Rows.MIXED, len(passes.batch), matched.device)
    text, image = passes.fused.text.select(rows), passes.fused.image.select(rows)
    return alignment_loss(text, image, matched, passes.config.wra_tokens)


def mrfr(passes: Passes) -> Loss:
    """Masked region feature regression."""
    hidden, tokens = _hidden(passes)
    target = passes.batch.masked_regions.features.values[hidden]
    predicted = passes.model.region_features(tokens)
    return feature_loss(predicted, target, passes.config.mrm_reduction)


def mrc(passes: Passes) -> Loss:
    """Masked region classification."""
    return class_loss(*_hidden_classes(passes))


def mrckl(passes: Passes) -> Loss:
    """Masked region classification with KL."""
    return class_divergence(*_hidden_classes(passes), passes.config.mrm_reduction)


def _hidden(passes: Passes) -> tuple[Tensor, Tensor]:
    """Packed indices (n,) of the hidden regions, and their fused tokens (n, D)."""
    hidden, fused = passes.batch.masked_regions.hidden.nonzero().squeeze(1), passes.fused.image
    first = passes.plan.first_sequence(Rows.MASKED_IMAGE, len(passes.batch))
    return hidden, fused.values[fused.cu_seqlens[first] + hidden]


def _hidden_classes(passes: Passes) -> tuple[Tensor, Tensor]:
    """Predicted logits (n, C) and the detector's distributions (n, C) of the hidden regions."""
    labels = passes.batch.masked_regions.labels
    if labels is None:
        raise ValueError(
            "objectives.mrc and objectives.mrckl need the detector's class distributions, "
            "and the regions have no labels; mrfr needs none"
        )
    hidden, tokens = _hidden(passes)
    return passes.model.region_logits(tokens), labels[hidden]


def aligned_masks(
    text: Ragged, image: Ragged, tokens: AlignedTokens
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Padded text (R, M, D) and image (R, N, D) tokens, and which take part in the transport.

    Args:
        text, image: packed tokens of R rows.
        tokens: "all" is UNITER's choice; "inner" is ViLT's: no start or end token, and no class
            token, which the image has first.

    Returns: text, image, text mask (R, M), image mask (R, N), bool.
    """
    (words, word_mask), (places, place_mask) = text.pad(), image.pad()
    if tokens == "inner":
        position = torch.arange(words.shape[1], device=words.device)
        word_mask = (position > 0) & (position < text.lens[:, None] - 1)
        place_mask = place_mask.clone()
        place_mask[:, 0] = False
    return words, places, word_mask, place_mask


def alignment_loss(text: Ragged, image: Ragged, matched: Tensor, tokens: AlignedTokens) -> Loss:
    """Word-region alignment: transport distance of matched rows minus that of the others.

    Args:
        text, image: packed fused tokens of R rows.
        matched (R,): bool.
        tokens: see `aligned_masks`.

    Returns: (sum of signed distances, R).

    Source: see `ops.wra_loss`.
    """
    words, places, word_mask, place_mask = aligned_masks(text, image, tokens)
    rows = matched.shape[0]
    mean = wra_loss(words, places, word_mask, place_mask, matched, weight=1.0)
    return mean * rows, torch.tensor(rows, device=mean.device)


def feature_loss(predicted: Tensor, target: Tensor, reduction: Literal["paper", "code"]) -> Loss:
    """Masked region feature regression: sum_r |predicted_r - target_r|^2.

    Args:
        predicted, target (n, D): of the n hidden regions.
        reduction: "paper" is a mean over regions of that sum; "code", as UNITER's, a mean over
            regions and dimensions: D times smaller.

    Source: Chen et al. 2020 (UNITER), section 3.2, arXiv:1909.11740; ChenRocks/UNITER
    model/pretrain.py `forward_mrfr`.
    """
    total = F.mse_loss(predicted.float(), target.float(), reduction="sum")
    return total, _count(predicted, reduction)


def class_loss(logits: Tensor, labels: Tensor) -> Loss:
    """Masked region classification: cross-entropy with the detector's most likely class that is not
    background.

    Args:
        logits (n, C): of the n hidden regions.
        labels (n, C): the detector's class distribution, column 0 background.

    Source: as `feature_loss`, `forward_mrc`.
    """
    foreground = labels[:, BACKGROUND + 1 :].argmax(1) + BACKGROUND + 1
    return F.cross_entropy(logits, foreground, reduction="sum"), _count(logits, "paper")


def class_divergence(logits: Tensor, labels: Tensor, reduction: Literal["paper", "code"]) -> Loss:
    """Masked region classification with KL: sum_r KL(labels_r || softmax(logits_r)).

    Args:
        logits, labels: as in `class_loss`.
        reduction: "paper" is a mean over regions; "code" over regions and classes: C times smaller.

    Source: as `feature_loss`, `forward_mrc` with `kl` and train's mean.
    """
    total = F.kl_div(F.log_softmax(logits, 1), labels.float(), reduction="sum")
    return total, _count(logits, reduction)


def _count(like: Tensor, reduction: str) -> Tensor:
    return torch.tensor(like.shape[0] if reduction == "paper" else like.numel(), device=like.device)
