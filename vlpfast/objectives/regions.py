"""Losses on regions: transport between words and regions, and what hidden regions were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.objectives.matching import matched_pairs
from vlpfast.objectives.passes import Loss, Passes
from vlpfast.objectives.table import Rows
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
    first = 1 + passes.model.config.fusion.class_token
    return alignment_loss(text, image, matched, passes.config.wra_tokens, first)


def mrfr(passes: Passes) -> Loss:
    """Masked region feature regression."""
    hidden, tokens = _hidden(passes)
    target = passes.shown_regions.features.values[hidden]
    predicted = passes.model.region_features(tokens)
    config = passes.config
    return feature_loss(predicted, target, config.mrm_reduction, config.mrfr_loss)


def mrc(passes: Passes) -> Loss:
    """Masked region classification."""
    if not passes.config.mrc_weighted:
        return class_loss(*_hidden_classes(passes))
    return _by_confidence(passes, passes.model.region_logits, _labels(passes))


def mra(passes: Passes) -> Loss:
    """Masked region attributes: as `mrc` by confidence, of the attributes that the detector tells.

    Source: as `weighted_class_loss`.
    """
    attributes = passes.shown_regions.attributes
    if attributes is None:
        raise ValueError(
            "objectives.mra needs the detector's distributions of attributes (attributes.npy), "
            "and the regions have none"
        )
    expected = passes.model.config.vision.region_attributes
    if attributes.shape[1] != expected:
        raise ValueError(
            f"regions.attributes must have model.vision.region_attributes {expected} columns, none "
            f"among them, got {attributes.shape[1]}"
        )
    return _by_confidence(passes, passes.model.attribute_logits, attributes)


def _by_confidence(passes: Passes, logits_of: Callable[[Tensor], Tensor], labels: Tensor) -> Loss:
    """`weighted_class_loss` of what `logits_of` makes of fused tokens, labels (T, C) of all."""
    if passes.config.mrm_reduction == "paper":
        hidden, tokens = _hidden(passes)
        return weighted_class_loss(logits_of(tokens), labels[hidden])
    every = torch.arange(labels.shape[0], device=labels.device)
    logits = logits_of(_region_tokens(passes, every))
    return weighted_class_loss(logits, labels, passes.config.mrm_probability)


def mrckl(passes: Passes) -> Loss:
    """Masked region classification with KL."""
    return class_divergence(*_hidden_classes(passes), passes.config.mrm_reduction)


def _hidden(passes: Passes) -> tuple[Tensor, Tensor]:
    """Packed indices (n,) of the hidden regions, and their fused tokens (n, D)."""
    hidden = passes.shown_regions.hidden.nonzero().squeeze(1)
    return hidden, _region_tokens(passes, hidden)


def _region_tokens(passes: Passes, regions: Tensor) -> Tensor:
    """Fused tokens (n, D) of the regions of packed indices (n,)."""
    fused = passes.fused.image
    first = passes.plan.first_sequence(Rows.MASKED_IMAGE, len(passes.batch))
    places = fused.cu_seqlens[first] + regions
    if offset := passes.model.config.vision.region_offset:
        places = places + offset * (passes.shown_regions.features.row_ids()[regions] + 1)
    return fused.values[places]


def _hidden_classes(passes: Passes) -> tuple[Tensor, Tensor]:
    """Predicted logits (n, C) and the detector's distributions (n, C) of the hidden regions."""
    hidden, tokens = _hidden(passes)
    return passes.model.region_logits(tokens), _labels(passes)[hidden]


def _labels(passes: Passes) -> Tensor:
    """The detector's class distributions (T, C) of all regions."""
    labels = passes.shown_regions.labels
    if labels is None:
        raise ValueError(
            "objectives.mrc and objectives.mrckl need the detector's class distributions, "
            "and the regions have no labels; mrfr needs none"
        )
    return labels


def aligned_masks(
    text: Ragged, image: Ragged, tokens: AlignedTokens, first: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Padded text (R, M, D) and image (R, N, D) tokens, and which take part in the transport.

    Args:
        text, image: packed tokens of R rows.
        tokens: "all" is UNITER's choice; "inner" is ViLT's: no start or end token, and no class
            tokens, of which the image has `first` before others.

    Returns: text, image, text mask (R, M), image mask (R, N), bool.
    """
    (words, word_mask), (places, place_mask) = text.pad(), image.pad()
    if tokens == "inner":
        position = torch.arange(words.shape[1], device=words.device)
        word_mask = (position > 0) & (position < text.lens[:, None] - 1)
        place_mask = place_mask.clone()
        place_mask[:, :first] = False
    return words, places, word_mask, place_mask


def alignment_loss(
    text: Ragged, image: Ragged, matched: Tensor, tokens: AlignedTokens, first: int = 1
) -> Loss:
    """Word-region alignment: transport distance of matched rows minus that of the others.

    Args:
        text, image: packed fused tokens of R rows.
        matched (R,): bool.
        tokens, first: see `aligned_masks`.

    Returns: (sum of signed distances, R).

    Source: see `ops.wra_loss`.
    """
    words, places, word_mask, place_mask = aligned_masks(text, image, tokens, first)
    rows = matched.shape[0]
    mean = wra_loss(words, places, word_mask, place_mask, matched, weight=1.0)
    return mean * rows, torch.tensor(rows, device=mean.device)


def feature_loss(
    predicted: Tensor,
    target: Tensor,
    reduction: Literal["paper", "code"],
    kind: Literal["mse", "smooth_l1"] = "mse",
) -> Loss:
    """Masked region feature regression: sum_r |predicted_r - target_r|^2, or summed over dimensions
    d^2 / 2 where d = |difference| < 1, else d - 1/2 (LXMERT).

    Args:
        predicted, target (n, D): of the n hidden regions.
        reduction: "paper" is a mean over regions of that sum; "code", as UNITER's and LXMERT's, a
            mean over regions and dimensions: D times smaller.
        kind: of the distance.

    Source: Chen et al. 2020 (UNITER), section 3.2, arXiv:1909.11740; ChenRocks/UNITER
    model/pretrain.py `forward_mrfr`.
    """
    distance = F.mse_loss if kind == "mse" else F.smooth_l1_loss
    total = distance(predicted.float(), target.float(), reduction="sum")
    return total, _count(predicted, reduction)


def class_loss(logits: Tensor, labels: Tensor) -> Loss:
    """Masked region classification: cross-entropy with the detector's most likely class that is not
    background.

    Args:
        logits (n, C), or (n, C - 1) without background: of the n hidden regions.
        labels (n, C): the detector's class distribution, column 0 background.

    Source: as `feature_loss`, `forward_mrc`.
    """
    _, target = _foreground(logits, labels)
    return F.cross_entropy(logits, target, reduction="sum"), _count(logits, "paper")


def weighted_class_loss(logits: Tensor, labels: Tensor, share: float = 1.0) -> Loss:
    """Region classification by confidence: sum_r c_r CE(logits_r, the class whose probability c_r
    is largest of those that are not background).

    Args:
        logits, labels: as in `class_loss`, of n regions.
        share: of the regions how many the mean is taken over. LXMERT's code has all regions in the
            sum, hidden or not, and divides by their number times the share that is hidden.

    Source: Tan & Bansal 2019 (LXMERT), section 3.1.2, arXiv:1908.07490; airsplay/lxmert
    src/lxrt/modeling.py `LXRTPretraining`.
    """
    confidence, target = _foreground(logits, labels)
    losses = F.cross_entropy(logits, target, reduction="none")
    return (confidence * losses).sum(), _count(logits, "paper") * share


def class_divergence(logits: Tensor, labels: Tensor, reduction: Literal["paper", "code"]) -> Loss:
    """Masked region classification with KL: sum_r KL(labels_r || softmax(logits_r)).

    Args:
        logits, labels: as in `class_loss`.
        reduction: "paper" is a mean over regions; "code" over regions and classes: C times smaller.

    Source: as `feature_loss`, `forward_mrc` with `kl` and train's mean.
    """
    total = F.kl_div(F.log_softmax(logits, 1), labels.float(), reduction="sum")
    return total, _count(logits, reduction)


def _foreground(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The largest probability (n,) that is not background, and its column in `logits` (n,)."""
    lacking = labels.shape[1] - logits.shape[1]
    if lacking not in (0, 1):
        raise ValueError(
            f"regions.labels must have {logits.shape[1]} classes, or one more of background, "
            f"got {labels.shape[1]}: set model.vision.region_classes to the detector's"
        )
    confidence, target = labels[:, BACKGROUND + 1 :].float().max(1)
    return confidence, target + BACKGROUND + 1 - lacking


def _count(like: Tensor, reduction: str) -> Tensor:
    return torch.tensor(like.shape[0] if reduction == "paper" else like.numel(), device=like.device)
