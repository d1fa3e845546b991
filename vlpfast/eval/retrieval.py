"""Image-text retrieval on embeddings: ranks by counting, recall, mean and median rank, chance.

Pure functions of embeddings and ids: no model, no loader. Letters: I images, T texts, Q queries, C
candidates, k shortlist length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

RECALLS = (1, 5, 10)
PoolTexts = Literal["none", "mean"]


@dataclass(frozen=True)
class Ranks:
    """Where the best relevant candidate of each of Q queries stands among C candidates.

    Candidates of equal score stand in random order, so a rank is a distribution: uniform over the
    places that the tie occupies. Recall and mean rank are its exact expectations, and a model that
    scores everything alike gets exactly the chance level.

    Attributes:
        greater (Q,): int64 irrelevant candidates that score strictly higher.
        tied (Q,): int64 irrelevant candidates of the same score.
        tied_relevant (Q,): int64 relevant candidates of that score, at least 1.
        relevant (Q,): int64 relevant candidates of any score.
        num_candidates: C.
        best (Q,): score of the best relevant candidate.
        top_scores (Q, k): the k best scores, descending.
        top_rows (Q, k): int64 candidates they belong to.
    """

    greater: Tensor
    tied: Tensor
    tied_relevant: Tensor
    relevant: Tensor
    num_candidates: int
    best: Tensor
    top_scores: Tensor
    top_rows: Tensor

    def recall(self, k: int) -> float:
        """Probability, over queries and order of ties, that a relevant candidate is in the top k.

        A query misses when all of the m = k - greater places left go to the irrelevant ones of the
        tie: C(tied, m) / C(tied + tied_relevant, m), a binomial ratio.
        """
        tied, tied_relevant = self.tied.double(), self.tied_relevant.double()
        places = (k - self.greater).clamp(min=0).double()
        places = torch.minimum(places, tied)
        log_miss = (
            (tied + 1).lgamma()
            - (tied - places + 1).lgamma()
            - (tied + tied_relevant + 1).lgamma()
            + (tied + tied_relevant - places + 1).lgamma()
        )
        hit = -log_miss.expm1()
        return hit.where(k - self.greater <= self.tied, 1).mean().item()

    def mean_rank(self) -> float:
        """Expected rank, from 1, of the first relevant candidate.

        The first of r among n + r places in random order stands at (n + r + 1) / (r + 1).
        """
        first = (self.tied + self.tied_relevant + 1).double() / (self.tied_relevant + 1)
        return (self.greater + first).mean().item()

    def median_rank(self) -> int:
        """The smallest k with recall(k) >= 1/2: the lower median of the rank."""
        low, high = 1, self.num_candidates
        while low < high:
            middle = (low + high) // 2
            # 1e-9: recall is a float64 mean, and a half must not be missed by its rounding.
            if self.recall(middle) >= 0.5 - 1e-9:
                high = middle
            else:
                low = middle + 1
        return low

    def chance(self) -> Ranks:
        """The ranks of a model that scores all candidates alike."""
        none = torch.zeros_like(self.greater)
        irrelevant = self.num_candidates - self.relevant
        return Ranks(
            none,
            irrelevant,
            self.relevant,
            self.relevant,
            self.num_candidates,
            torch.zeros_like(self.best),
            self.top_scores[:, :0],
            self.top_rows[:, :0],
        )


def rank_queries(
    queries: Tensor,
    candidates: Tensor,
    query_ids: Tensor,
    candidate_ids: Tensor,
    *,
    topk: int = 0,
    chunk: int = 2**24,
) -> Ranks:
    """Ranks the best relevant candidate of each query; relevant means of equal id.

    Counts the candidates that score higher, in blocks of queries: nothing is sorted, and the Q x C
    scores are never held at once.

    Args:
        queries (Q, D): embeddings; scores are computed in fp32.
        candidates (C, D): embeddings.
        query_ids (Q,): int64; every one must occur in `candidate_ids`.
        candidate_ids (C,): int64.
        topk: also return the `min(topk, C)` best candidates of each query.
        chunk: scores held at once.
    """
    queries, candidates = queries.float(), candidates.float()
    topk = min(topk, len(candidates))
    # Candidates of one id are neighbours in `order`: the relevant ones of a query are a range.
    sorted_ids, order = candidate_ids.sort(stable=True)
    query_ids = query_ids.contiguous()
    first = torch.searchsorted(sorted_ids, query_ids)
    relevant = torch.searchsorted(sorted_ids, query_ids, right=True) - first
    _check_answerable(query_ids, relevant)
    blocks = []
    rows = max(1, chunk // len(candidates))
    for block, start, num in zip(
        queries.split(rows), first.split(rows), relevant.split(rows), strict=True
    ):
        scores = block @ candidates.T
        owner = torch.arange(len(block), device=scores.device).repeat_interleave(num)
        place = torch.arange(len(owner), device=scores.device) - (num.cumsum(0) - num)[owner]
        sought = scores[owner, order[start[owner] + place]]
        best = scores.new_full((len(block),), -torch.inf).scatter_reduce(0, owner, sought, "amax")
        tied_relevant = torch.zeros_like(num).scatter_add(0, owner, (sought == best[owner]).long())
        greater = (scores > best[:, None]).sum(1)
        tied = (scores == best[:, None]).sum(1) - tied_relevant
        blocks.append((greater, tied, tied_relevant, best, *scores.topk(topk, dim=1)))
    greater, tied, tied_relevant, best, top_scores, top_rows = map(
        torch.cat, zip(*blocks, strict=True)
    )
    return Ranks(
        greater, tied, tied_relevant, relevant, len(candidates), best, top_scores, top_rows
    )


def pool_by_id(embeddings: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Averages the embeddings of each id and normalises the mean.

    Args:
        embeddings (T, D): any float dtype.
        ids (T,): int64.

    Returns:
        (C, D) fp32 L2-normalised means and (C,) their distinct ids, ascending.
    """
    # A segmented mean over sorted rows adds in a fixed order, which index_add on a GPU does not.
    order = ids.argsort(stable=True)
    unique, counts = ids[order].unique_consecutive(return_counts=True)
    pooled = torch.segment_reduce(embeddings.float()[order], "mean", lengths=counts)
    return normalize(pooled, dim=-1), unique


def recall_metrics(txt: Ranks, img: Ranks) -> dict[str, float]:
    """The field's names for both directions: `txt` image to text, `img` text to image.

    Recalls in percent; `r_mean` averages the two directions' `r_mean`, `rsum` adds the six recalls.
    """
    metrics: dict[str, float] = {}
    for name, ranks in (("txt", txt), ("img", img)):
        recalls = {f"{name}_r{k}": 100 * ranks.recall(k) for k in RECALLS}
        metrics |= recalls
        metrics[f"{name}_r_mean"] = sum(recalls.values()) / len(recalls)
        metrics[f"{name}_medr"] = ranks.median_rank()
        metrics[f"{name}_meanr"] = ranks.mean_rank()
    metrics["r_mean"] = (metrics["txt_r_mean"] + metrics["img_r_mean"]) / 2
    metrics["rsum"] = len(RECALLS) * 2 * metrics["r_mean"]
    return metrics


def retrieval_ranks(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    *,
    pool_texts: PoolTexts = "none",
    topk: int = 0,
    chunk: int = 2**24,
) -> tuple[Ranks, Ranks]:
    """Ranks of both directions, image to text first. Arguments as in `retrieval_metrics`."""
    _check("image", image_embeddings, image_ids)
    _check("text", text_embeddings, text_ids)
    if image_embeddings.shape[1] != text_embeddings.shape[1]:
        raise ValueError(
            "expected image and text embeddings of one width, got"
            f" {tuple(image_embeddings.shape)} and {tuple(text_embeddings.shape)}"
        )
    if pool_texts == "mean":
        text_embeddings, text_ids = pool_by_id(text_embeddings, text_ids)
    elif pool_texts != "none":
        raise ValueError(f"pool_texts: expected 'none' or 'mean', got {pool_texts!r}")
    images, texts = (image_embeddings, image_ids), (text_embeddings, text_ids)
    return tuple(
        rank_queries(queries, candidates, query_ids, candidate_ids, topk=topk, chunk=chunk)
        for (queries, query_ids), (candidates, candidate_ids) in ((images, texts), (texts, images))
    )


def retrieval_metrics(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    *,
    pool_texts: PoolTexts = "none",
    chunk: int = 2**24,
) -> dict[str, float | int | dict[str, float]]:
    """Recall at 1, 5, 10, mean and median rank of both directions, beside chance.

    A candidate is relevant if its id equals the query's, so several captions an image and several
    images an id (a concept) are counted alike: a query hits at k if ANY relevant candidate is among
    its top k. Ties are broken at random, in expectation (`Ranks`).

    Args:
        image_embeddings (I, D): L2-normalised.
        text_embeddings (T, D): L2-normalised.
        image_ids (I,): int64.
        text_ids (T,): int64 id of the image or concept each text belongs to.
        pool_texts: "mean" makes one candidate (and one query) of all texts of an id: their
            normalised mean.
        chunk: scores held at once.

    Returns:
        `recall_metrics` (percent), `num_images`, `num_texts` (after pooling), `num_ids`, and under
        `chance` the same metrics for a model that scores all candidates alike.

    Source: Faghri et al. 2018 (VSE++), section 4, arXiv:1707.05612; names as in ALBEF's and
    UNITER's evaluation. They rank the best relevant candidate by argsort, whose order of ties is
    arbitrary.
    """
    txt, img = retrieval_ranks(
        image_embeddings,
        text_embeddings,
        image_ids,
        text_ids,
        pool_texts=pool_texts,
        chunk=chunk,
    )
    return {
        **recall_metrics(txt, img),
        "num_images": img.num_candidates,
        "num_texts": txt.num_candidates,
        "num_ids": len(image_ids.unique()),
        "chance": recall_metrics(txt.chance(), img.chance()),
    }


def _check(name: str, embeddings: Tensor, ids: Tensor) -> None:
    if embeddings.ndim != 2 or ids.shape != embeddings.shape[:1]:
        raise ValueError(
            f"expected {name}_embeddings (N, D) and {name}_ids (N,), got"
            f" {tuple(embeddings.shape)} and {tuple(ids.shape)}"
        )
    if len(ids) == 0:
        raise ValueError(f"{name}_embeddings is empty: nothing to evaluate")
    if not embeddings.isfinite().all():
        # A NaN compares false with everything, and would count as rank 1.
        raise ValueError(f"{name}_embeddings holds NaN or Inf")


def _check_answerable(query_ids: Tensor, relevant: Tensor) -> None:
    alone = query_ids[relevant == 0]
    if len(alone):
        raise ValueError(
            f"{len(alone)} of {len(query_ids)} queries have no candidate of their id,"
            f" the first is id {alone[0].item()}: every image needs a text and every text an image"
        )
