"""Pairs that belong together told from noisy ones: how good a filter a model's scores are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from vlpfast.data.batch import Batch
from vlpfast.data.index import Index, TokenTable
from vlpfast.eval.pairs import Metric, sample_scores
from vlpfast.eval.report import EvalResult
from vlpfast.models.vlp import VLPModel

# What each metric's figures are called behind.
_PREFIX = {"similarity": "", "match": "itm_"}


def noise_probe(
    model: VLPModel,
    metrics: Sequence[Metric],
    batches: Iterable[Batch],
    index: Index,
    tokens: TokenTable,
    *,
    captions: Sequence[int] = (),
    pairs_per_call: int = 512,
) -> EvalResult:
    """The area under the ROC curve of each metric against the records' field `noisy`: the chance
    that a clean pair scores higher than a noisy one. And how many are clean of the pairs that are
    kept where as many are kept as there are clean ones.

    Args:
        model: in eval mode, one that gives `metrics`.
        batches: one pass over the images of `index`.
        tokens: of its captions.
        captions, pairs_per_call: as in `eval.pairs.sample_scores`.
    """
    scores: dict[str, list[Tensor]] = {metric: [] for metric in metrics}
    noisy: list[bool] = []
    for batch in batches:
        noisy += [_is_noisy(index, i) for i in batch.sample_ids.tolist()]
        for metric, found in scores.items():
            options = {"captions": captions, "pairs_per_call": pairs_per_call}
            found.append(sample_scores(model, metric, batch, index, tokens, **options))
    clean = ~torch.tensor(noisy, dtype=torch.bool)
    num_clean, num_noisy = int(clean.sum()), int((~clean).sum())
    if not num_clean or not num_noisy:
        raise ValueError(f"noise needs clean and noisy samples, got {num_clean} and {num_noisy}")
    found, intervals = {}, {}
    for metric, parts in scores.items():
        values, prefix = torch.cat(parts), _PREFIX[metric]
        area = auc(values, clean)
        found[f"{prefix}noise_auc"] = 100 * area
        found[f"{prefix}kept_clean"] = 100 * kept_clean(values, clean)
        spread = 1.96 * auc_error(area, num_clean, num_noisy)
        bounds = max(0.0, area - spread), min(1.0, area + spread)
        intervals[f"{prefix}noise_auc"] = tuple(100 * bound for bound in bounds)
    return EvalResult(
        "noise",
        metrics=found,
        chance={"noise_auc": 50.0, "kept_clean": 100 * num_clean / len(clean)},
        counts={"num_samples": len(clean), "num_noisy": num_noisy},
        intervals=intervals,
    )


def _is_noisy(index: Index, sample: int) -> bool:
    record = index.record(sample)
    if not isinstance(record.get("noisy"), bool):
        raise ValueError(
            f"noise needs to know which samples are noisy: {index.name(sample)} has no field "
            "'noisy' of true or false (`vlpfast data make scenes --noise 0.3` writes it)"
        )
    return record["noisy"]


def auc(scores: Tensor, positive: Tensor) -> float:
    """The chance that a positive's score is higher than another's, ties counting half.

    Args:
        scores (N,): any order.
        positive (N,): bool, some of each kind.
    """
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0) - (counts - 1).double() / 2
    num_positive = int(positive.sum())
    above = ranks[place[positive]].sum().item() - num_positive * (num_positive + 1) / 2
    return above / (num_positive * (len(scores) - num_positive))


def auc_error(area: float, num_positive: int, num_negative: int) -> float:
    """Standard error of an area under the ROC curve.

    Source: Hanley and McNeil 1982, Radiology 143(1), eq. 1 and 2.
    """
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (
        area * (1 - area)
        + (num_positive - 1) * (one - area**2)
        + (num_negative - 1) * (two - area**2)
    ) / (num_positive * num_negative)
    return max(variance, 0.0) ** 0.5


def kept_clean(scores: Tensor, clean: Tensor) -> float:
    """Of the pairs of highest scores, as many as there are clean ones, the share that is clean;
    those that tie at the border count by their mean.
    """
    num_kept = int(clean.sum())
    border = scores.sort(descending=True).values[num_kept - 1]
    above, tied = scores > border, scores == border
    left = num_kept - int(above.sum())
    hits = (clean & above).sum() + left * clean[tied].double().mean()
    return hits.item() / num_kept
