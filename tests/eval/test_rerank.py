"""Re-ranking against scoring every pair on its own and sorting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vlpfast.eval.rerank import rerank, score_pairs
from vlpfast.eval.retrieval import recall_metrics, retrieval_ranks
from vlpfast.ragged import Ragged

DIM = 8


class Matcher(nn.Module):
    """Text tokens plus a nonlinear summary of their image; counts the work it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.key = nn.Parameter(torch.randn(DIM, DIM, generator=generator))
        self.head = nn.Parameter(torch.randn(DIM, 2, generator=generator))
        self.images_projected = self.pairs_fused = self.largest_call = 0

    def image_keys(self, tokens: Tensor) -> Tensor:
        self.images_projected += len(tokens)
        return (tokens @ self.key).mean(1)

    def fuse_pairs(self, text: Ragged, keys: Tensor, kv_index: Tensor, images: bool) -> Ragged:
        assert not images
        self.pairs_fused += len(text)
        self.largest_call = max(self.largest_call, len(text))
        return text.with_values((text.values + keys[kv_index][text.row_ids()]).tanh())

    def match(self, fused: Ragged) -> Tensor:
        return fused.values[fused.first()] @ self.head


def problem(image_ids: list[int], text_ids: list[int]):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(len(image_ids), 5, DIM, generator=generator)
    lens = torch.randint(1, 7, (len(text_ids),), generator=generator)
    text = Ragged.from_padded(torch.randn(len(text_ids), 6, DIM, generator=generator), lens)
    image_embeddings = torch.nn.functional.normalize(tokens.mean(1), dim=-1)
    text_embeddings = torch.nn.functional.normalize(text.values[text.last()], dim=-1)
    ids = torch.tensor(image_ids), torch.tensor(text_ids)
    return tokens, text, image_embeddings, text_embeddings, ids


def one_pair(model: Matcher, tokens: Tensor, text: Ragged, image: int, row: int) -> float:
    fused = model.fuse_pairs(
        text.select(torch.tensor([row])),
        model.image_keys(tokens[image : image + 1]),
        torch.tensor([0]),
        images=False,
    )
    logits = model.match(fused)[0]
    return float(logits[1] - logits[0])


def metrics_by_sorting(itm: Tensor, itc: Tensor, query_ids, candidate_ids, k: int) -> list[float]:
    """First relevant rank of every query: the top k by `itc` sorted by `itm`, then the rest."""
    ranks = []
    for q in range(len(itm)):
        order = itc[q].argsort(descending=True).tolist()
        order = sorted(order[:k], key=lambda c, q=q: -float(itm[q, c])) + order[k:]
        ranks.append(1 + [bool(candidate_ids[c] == query_ids[q]) for c in order].index(True))
    return ranks


IDS = {
    "one-to-one": ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]),
    "3-captions": ([0, 1, 2, 3], [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]),
    "shared": ([3, 1, 3, 2, 9, 1], [9, 1, 2, 3, 3, 1, 2, 9]),
}


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("k", [1, 3, 100])
@pytest.mark.parametrize("itc_weight", [0.0, 1.0])
@torch.inference_mode()
def test_equals_scoring_each_pair(
    name: str, k: int, itc_weight: float, device: torch.device
) -> None:
    tokens, text, image, caption, (image_ids, text_ids) = problem(*IDS[name])
    model = Matcher()
    itc = image @ caption.T
    itm = torch.tensor(
        [[one_pair(model, tokens, text, i, t) for t in range(len(text))] for i in range(len(image))]
    )
    scores = itm + itc_weight * itc
    expected = (
        metrics_by_sorting(scores, itc, image_ids, text_ids, k),
        metrics_by_sorting(scores.T, itc.T, text_ids, image_ids, k),
    )
    # Images stay where they were loaded, all else is on the device.
    image_ids, text_ids = image_ids.to(device), text_ids.to(device)
    ranks = retrieval_ranks(image.to(device), caption.to(device), image_ids, text_ids, topk=k)
    got = rerank(
        model.to(device),
        zip(torch.arange(len(image)).split(2), tokens.split(2), strict=True),
        text.to(device),
        image_ids,
        text_ids,
        *ranks,
        itc_weight=itc_weight,
        pairs_per_call=3,
    )
    for ranked, order in zip(got, expected, strict=True):
        assert not ranked.tied.any()
        assert (ranked.greater + 1).tolist() == order
    metrics = recall_metrics(*got)
    assert metrics["txt_r1"] == pytest.approx(
        100 * sum(r == 1 for r in expected[0]) / len(expected[0])
    )
    assert metrics["img_meanr"] == pytest.approx(sum(expected[1]) / len(expected[1]))


def test_work_is_shared_and_bounded() -> None:
    tokens, text, image, caption, ids = problem(list(range(6)), list(range(6)))
    ranks = retrieval_ranks(image, caption, *ids, topk=6)
    model = Matcher()
    rerank(
        model,
        zip(torch.arange(6).split(4), tokens.split(4), strict=True),
        text,
        *ids,
        *ranks,
        pairs_per_call=5,
    )
    # Both directions ask for all 36 pairs; each image is projected once.
    assert (model.images_projected, model.pairs_fused, model.largest_call) == (6, 36, 5)


@torch.inference_mode()
def test_order_and_batches_of_images_do_not_matter() -> None:
    tokens, text, *_ = problem([0] * 6, [0] * 4)
    pair_image = torch.tensor([0, 0, 2, 2, 2, 5])
    pair_text = torch.tensor([0, 3, 1, 2, 3, 0])
    model = Matcher()
    expected = [
        one_pair(model, tokens, text, i, t) for i, t in zip(pair_image, pair_text, strict=True)
    ]
    for size in (1, 4, 6):
        rows = torch.tensor([5, 1, 0, 3, 2, 4]).split(size)
        batches = [(row, tokens[row]) for row in rows]
        scores = score_pairs(model, batches, text, pair_image, pair_text, pairs_per_call=2)
        torch.testing.assert_close(scores, torch.tensor(expected))


@torch.inference_mode()
def test_ties_at_the_cut_stand_ahead_of_what_missed_it() -> None:
    # All texts have one contrastive score: the shortlist of two holds the sought one or not.
    tokens, text, _, _, ids = problem([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    ranks = retrieval_ranks(torch.ones(5, 2), torch.ones(5, 2), *ids, topk=2)
    model = Matcher()
    txt, _ = rerank(model, [(torch.arange(5), tokens)], text, *ids, *ranks)
    seen = set()
    for image, top in enumerate(ranks[0].top_rows.tolist()):
        seen.add(image in top)
        if image in top:
            (other,) = set(top) - {image}
            mine, other = (one_pair(model, tokens, text, image, t) for t in (image, other))
            expected = (int(other > mine), 0)
        else:
            expected = (2, 2)
        assert (txt.greater[image].item(), txt.tied[image].item()) == expected
    assert seen == {True, False}


def test_matcher_without_opinion_gives_chance_within_the_shortlist() -> None:
    tokens, text, image, caption, ids = problem(list(range(5)), list(range(5)))
    model = Matcher()
    model.head.data.zero_()
    txt, _ = rerank(
        model,
        [(torch.arange(5), tokens)],
        text,
        *ids,
        *retrieval_ranks(image, caption, *ids, topk=5),
    )
    assert txt.recall(1) == pytest.approx(0.2)
    assert txt.mean_rank() == pytest.approx(3.0)


def test_refuses_missing_images_and_pooled_texts() -> None:
    tokens, text, image, caption, ids = problem([0, 1, 2], [0, 1, 2])
    ranks = retrieval_ranks(image, caption, *ids, topk=2)
    with pytest.raises(ValueError, match="first of image row 1: image_batches must yield every"):
        rerank(Matcher(), [(torch.tensor([0]), tokens[:1])], text, *ids, *ranks)
    pooled = retrieval_ranks(
        image, caption, torch.zeros(3).long(), torch.zeros(3).long(), pool_texts="mean", topk=1
    )
    with pytest.raises(ValueError, match="pooled texts cannot be re-ranked"):
        rerank(Matcher(), [(torch.arange(3), tokens)], text, *ids, *pooled)
