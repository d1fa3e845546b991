"""How well a text fits an image, by a trained model: cosine in its joint space, or the probability
that they match.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vlpfast.data.batch import Batch
from vlpfast.data.index import Index, TokenTable
from vlpfast.eval.rerank import score_pairs
from vlpfast.images import Images
from vlpfast.models.config import ModelConfig
from vlpfast.models.presets import missing
from vlpfast.models.vlp import VLPModel
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.ragged import Ragged
from vlpfast.regions import Regions

Metric = Literal["similarity", "match"]
_NEEDS = {"similarity": ("a joint space",), "match": ("a matching head", "a fusion tower")}


def metrics_of(model: ModelConfig, objectives: ObjectivesConfig | None) -> list[Metric]:
    """The metrics that a model has learned to give."""
    return [metric for metric in _NEEDS if not _problem(metric, model, objectives)]


def check_metric(
    metric: Metric, model: ModelConfig, objectives: ObjectivesConfig | None = None
) -> None:
    """Raises ValueError where the model cannot give a metric, or `objectives` have not trained it.

    It says which presets can.
    """
    if metric not in _NEEDS:
        raise ValueError(f"metric must be one of {tuple(_NEEDS)}, got {metric!r}")
    if problem := _problem(metric, model, objectives):
        raise ValueError(f"metric {metric!r} needs {problem}")


def _problem(metric: Metric, model: ModelConfig, objectives: ObjectivesConfig | None) -> str:
    for part in _NEEDS[metric]:
        if part not in model.parts:
            return f"{part}; {missing(model.preset, part)}"
    if metric == "match" and objectives is not None and not objectives.itm:
        return "a matching head that was trained: objectives.itm was 0"
    return ""


def pair_scores(
    model: VLPModel,
    metric: Metric,
    visual: Tensor | Images | Regions,
    text: Ragged,
    kv_index: Tensor,
    *,
    pairs_per_call: int = 512,
) -> Tensor:
    """The score of text t with image `kv_index[t]`: (T,) fp32, each image encoded once.

    "similarity" is the cosine of the embeddings, in [-1, 1]; "match" the probability of matching.

    Args:
        model: in eval mode; one that `check_metric` passes.
        visual: what the model reads of B images.
        text: packed token ids of T texts.
        kv_index (T,): int64, ascending.
        pairs_per_call: pairs matched at once.
    """
    if metric == "similarity":
        image = model.encode_image(visual, with_tokens=False).embedding.float()
        words = model.encode_text(text, with_tokens=False).embedding.float()
        return (image[kv_index] * words).sum(-1).clamp(-1, 1)
    tokens = model.encode_image(visual, num_embedded=0).tokens
    images = torch.arange(len(visual), device=text.values.device)
    odds = score_pairs(
        model,
        [(images, tokens)],
        model.encode_text(text, num_embedded=0).tokens,
        kv_index,
        torch.arange(len(text), device=text.values.device),
        pairs_per_call=pairs_per_call,
    )
    return odds.sigmoid()


@torch.inference_mode()
def sample_scores(
    model: VLPModel,
    metric: Metric,
    batch: Batch,
    index: Index,
    tokens: TokenTable,
    *,
    captions: Sequence[int] = (),
    pairs_per_call: int = 512,
) -> Tensor:
    """The mean score of each sample's captions at the places `captions` (`chosen_captions`): (B,)
    fp32 on the CPU.

    Args:
        model, metric, pairs_per_call: as in `pair_scores`.
        batch: of images.
        index: whose samples they are.
        tokens: of its captions.
    """
    caption_ids, rows = chosen_captions(index, batch.sample_ids, captions)
    each = pair_scores(
        model,
        metric,
        batch.to(model.device).visual(model.config.vision.front),
        tokens.ragged(caption_ids.numpy()).to(model.device),
        rows.to(model.device),
        pairs_per_call=pairs_per_call,
    )
    lengths = rows.bincount(minlength=len(batch))
    return torch.segment_reduce(each.cpu(), "mean", lengths=lengths)


def chosen_captions(index: Index, samples: Tensor, places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The captions of samples (B,) at some places, all of a sample that has none of these, or of
    every sample without `places`: caption ids (T,), and of which of the B each is (T,), ascending.
    """
    first, count = (torch.from_numpy(a) for a in index.caption_ranges(samples.numpy()))
    rows = torch.arange(len(samples)).repeat_interleave(count)
    place = torch.arange(len(rows)) - (count.cumsum(0) - count)[rows]
    if places:
        wanted = torch.isin(place, torch.tensor(places))
        has_none = rows.new_zeros(len(samples)).index_add(0, rows, wanted.long()) == 0
        wanted = wanted | has_none[rows]
        rows, place = rows[wanted], place[wanted]
    return first[rows] + place, rows
