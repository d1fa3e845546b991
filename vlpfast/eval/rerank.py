"""Re-ranking of a contrastive shortlist by image-text matching (ITM), grouped by image.

The keys and values of an image are projected once for all texts it is matched with, a pair that
both directions ask for is scored once, and memory is bounded by images and pairs per call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from vlpfast.eval.retrieval import Ranks
from vlpfast.ragged import Ragged


@torch.inference_mode()
def score_pairs(
    model: nn.Module,
    image_batches: Iterable[tuple[Tensor, Tensor]],
    text_tokens: Ragged,
    pair_image: Tensor,
    pair_text: Tensor,
    *,
    pairs_per_call: int = 512,
) -> Tensor:
    """Matching score of image-text pairs: logit of "match" minus logit of "no match".

    The difference is the log-odds of the matching probability, and orders pairs as that does.

    Args:
        model: in eval mode, with `image_keys`, `fuse_pairs`, `match`.
        image_batches: (rows (n,), tokens (n, N, D)) of all images, in any order.
        text_tokens: T texts as `encode_text` returns them.
        pair_image (P,): int64 image row of each pair, ascending.
        pair_text (P,): int64 text row of each pair.
        pairs_per_call: pairs fused at once.

    Returns:
        (P,) fp32 scores.

    Source: Li et al. 2021 (ALBEF), section 4, arXiv:2107.07651. Its code orders by the logit of
    "match" alone, which the probability does not follow.
    """
    device = text_tokens.values.device
    scores = torch.full(pair_image.shape, torch.nan, device=device)
    for rows, tokens in image_batches:
        rows = rows.to(device)
        first = torch.searchsorted(pair_image, rows)
        counts = torch.searchsorted(pair_image, rows, right=True) - first
        local = torch.arange(len(rows), device=device).repeat_interleave(counts)
        offset = (first - counts.cumsum(0) + counts)[local]
        pair_ids = torch.arange(len(local), device=device) + offset
        if len(pair_ids) == 0:
            continue
        keys = model.image_keys(tokens.to(device))
        for pairs, kv_index in zip(
            pair_ids.split(pairs_per_call), local.split(pairs_per_call), strict=True
        ):
            rows = text_tokens.select(pair_text[pairs])
            fused = model.fuse_pairs(rows, keys, kv_index, images=False)
            logits = model.match(fused).float()
            scores[pairs] = logits[:, 1] - logits[:, 0]
    missing = pair_image[scores.isnan()]
    if len(missing):
        raise ValueError(
            f"no matching score, or NaN, for {len(missing)} pairs, the first of image row"
            f" {missing[0].item()}: image_batches must yield every image"
        )
    return scores


def rerank(
    model: nn.Module,
    image_batches: Iterable[tuple[Tensor, Tensor]],
    text_tokens: Ragged,
    image_ids: Tensor,
    text_ids: Tensor,
    txt: Ranks,
    img: Ranks,
    *,
    itc_weight: float = 0.0,
    pairs_per_call: int = 512,
) -> tuple[Ranks, Ranks]:
    """Orders the top k candidates of each query by matching score; the rest stay behind them.

    Args:
        model, image_batches, text_tokens, pairs_per_call: as in `score_pairs`.
        image_ids (I,), text_ids (T,): int64, equal ids are relevant.
        txt, img: `retrieval_ranks(..., topk=k)` of the unpooled texts.
        itc_weight: adds this times the cosine similarity to the score (BLIP: 1).

    Returns:
        The ranks of both directions, image to text first.

    Source: Li et al. 2021 (ALBEF), section 4, arXiv:2107.07651: what is outside of the top k scores
    -100 for all. Adding the similarity: train_retrieval.py of Li et al. 2022 (BLIP),
    arXiv:2201.12086. Here what is outside keeps its contrastive order.
    """
    num_images, num_texts = len(image_ids), len(text_ids)
    if (txt.num_candidates, img.num_candidates) != (num_texts, num_images):
        raise ValueError(
            f"ranks of {img.num_candidates} images and {txt.num_candidates} texts do not fit"
            f" {num_images} image_ids and {num_texts} text_ids: pooled texts cannot be re-ranked"
        )
    # A pair is the number image * T + text, so the distinct pairs come out grouped by image.
    images = torch.arange(num_images, device=image_ids.device)[:, None]
    texts = torch.arange(num_texts, device=image_ids.device)[:, None]
    txt_pairs = images * num_texts + txt.top_rows
    img_pairs = img.top_rows * num_texts + texts
    pairs = torch.cat([txt_pairs.flatten(), img_pairs.flatten()]).unique()
    scores = score_pairs(
        model,
        image_batches,
        text_tokens,
        pairs // num_texts,
        pairs % num_texts,
        pairs_per_call=pairs_per_call,
    )

    def reordered(ranks: Ranks, pair: Tensor, query_ids: Tensor, candidate_ids: Tensor) -> Ranks:
        top = scores[torch.searchsorted(pairs, pair)] + itc_weight * ranks.top_scores
        return _rerank_top(ranks, top, query_ids[:, None] == candidate_ids[ranks.top_rows])

    return (
        reordered(txt, txt_pairs, image_ids, text_ids),
        reordered(img, img_pairs, text_ids, image_ids),
    )


def _rerank_top(ranks: Ranks, scores: Tensor, relevant: Tensor) -> Ranks:
    """Ranks with the top k scored anew: `scores` (Q, k), sought where `relevant` (Q, k)."""
    best = scores.masked_fill(~relevant, -torch.inf).amax(1)
    found = relevant.any(1)
    equal = scores == best[:, None]
    tied_relevant = (equal & relevant).sum(1)
    greater = (scores > best[:, None]).sum(1)
    # Without a relevant one in the top k, those of its tie that made the cut are ahead for good.
    ahead = (ranks.top_scores == ranks.best[:, None]).sum(1)
    return replace(
        ranks,
        greater=torch.where(found, greater, ranks.greater + ahead),
        tied=torch.where(found, equal.sum(1) - tied_relevant, ranks.tied - ahead),
        tied_relevant=torch.where(found, tied_relevant, ranks.tied_relevant),
        best=torch.where(found, best, ranks.best),
    )
