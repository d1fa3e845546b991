"""Retrieval metrics against a double loop, ties against the average over all orders, and chance."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlpfast.eval.retrieval import (
    Ranks,
    pool_by_id,
    rank_queries,
    recall_metrics,
    retrieval_metrics,
    retrieval_ranks,
)

UNTIED = ["txt_r1", "txt_r5", "txt_r10", "txt_r_mean", "txt_medr", "txt_meanr"]


def embeddings(num: int, dim: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(num, dim, generator=generator), dim=-1)


def brute_force(queries, candidates, query_ids, candidate_ids, prefix) -> dict[str, float]:
    """Sorts the candidates of every query and walks down to the first relevant one."""
    ranks = []
    for query, query_id in zip(queries, query_ids, strict=True):
        scores = [float(query @ candidate) for candidate in candidates]
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        ranks.append(1 + next(r for r, i in enumerate(order) if candidate_ids[i] == query_id))
    recalls = [100 * sum(r <= k for r in ranks) / len(ranks) for k in (1, 5, 10)]
    return {
        **{f"{prefix}_r{k}": r for k, r in zip((1, 5, 10), recalls, strict=True)},
        f"{prefix}_r_mean": sum(recalls) / 3,
        f"{prefix}_medr": statistics.median_low(ranks),
        f"{prefix}_meanr": sum(ranks) / len(ranks),
    }


# Identities of images and of texts: one caption each, several captions, several images an id, both.
IDS = {
    "one-to-one": (range(17), range(17)),
    "5-captions": (range(7), [i for i in range(7) for _ in range(5)]),
    "3-images": ([i // 3 for i in range(21)], range(7)),
    "both-shuffled": ([3, 1, 3, 2, 9, 1, 9, 9], [9, 1, 2, 3, 3, 1, 2, 9, 9, 1, 1]),
    "single": ([5], [5]),
}


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("chunk", [1, 30, 2**24])
def test_matches_double_loop(name: str, chunk: int, device: torch.device) -> None:
    image_ids, text_ids = (torch.tensor(list(ids)) for ids in IDS[name])
    image, text = embeddings(len(image_ids)), embeddings(len(text_ids), seed=1)
    arguments = (tensor.to(device) for tensor in (image, text, image_ids, text_ids))
    metrics = retrieval_metrics(*arguments, chunk=chunk)
    expected = brute_force(image, text, image_ids, text_ids, "txt")
    expected |= brute_force(text, image, text_ids, image_ids, "img")
    assert {k: metrics[k] for k in expected} == pytest.approx(expected, rel=1e-9)
    recalls = [metrics[f"{d}_r{k}"] for d in ("txt", "img") for k in (1, 5, 10)]
    assert metrics["rsum"] == pytest.approx(sum(recalls))
    assert metrics["r_mean"] == pytest.approx(sum(recalls) / 6)
    counts = {n: metrics[n] for n in ("num_images", "num_texts", "num_ids")}
    assert counts == {
        "num_images": len(image_ids),
        "num_texts": len(text_ids),
        "num_ids": len(set(image_ids.tolist())),
    }


def test_blocks_of_queries_count_alike() -> None:
    # Whole numbers make every score exact, so ties too must be counted alike.
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(-1, 2, (23, 3), generator=generator).float()
    text = torch.randint(-1, 2, (31, 3), generator=generator).float()
    image_ids, text_ids = torch.arange(23) % 8, torch.arange(31) % 8
    whole = rank_queries(image, text, image_ids, text_ids)
    for chunk in (1, 31, 64, 1000):
        part = rank_queries(image, text, image_ids, text_ids, chunk=chunk)
        for name in ("greater", "tied", "tied_relevant", "relevant", "best"):
            assert torch.equal(getattr(whole, name), getattr(part, name)), (name, chunk)
    assert whole.tied.sum() > 0


@settings(deadline=None, max_examples=40)
@given(
    greater=st.integers(0, 3),
    tied=st.integers(0, 3),
    relevant=st.integers(1, 3),
    k=st.integers(1, 8),
)
def test_ties_are_the_average_over_all_orders(
    greater: int, tied: int, relevant: int, k: int
) -> None:
    orders = list(itertools.permutations([False] * tied + [True] * relevant))
    ranks = [greater + 1 + order.index(True) for order in orders]
    counts = [torch.tensor([n]) for n in (greater, tied, relevant, relevant)]
    none = torch.zeros(1, 0)
    got = Ranks(*counts, greater + tied + relevant, torch.zeros(1), none, none.long())
    assert got.recall(k) == pytest.approx(sum(r <= k for r in ranks) / len(ranks), abs=1e-12)
    assert got.mean_rank() == pytest.approx(sum(ranks) / len(ranks))
    assert got.median_rank() == statistics.median_low(ranks)


@pytest.mark.parametrize("name", IDS)
def test_model_that_scores_all_alike_gets_chance(name: str) -> None:
    image_ids, text_ids = (torch.tensor(list(ids)) for ids in IDS[name])
    constant = torch.tensor([[1.0, 0.0]])
    metrics = retrieval_metrics(
        constant.expand(len(image_ids), 2), constant.expand(len(text_ids), 2), image_ids, text_ids
    )
    chance = metrics["chance"]
    assert {k: metrics[k] for k in chance} == pytest.approx(chance)


def test_chance_of_one_relevant_in_many() -> None:
    ids = torch.arange(1000)
    chance = retrieval_metrics(embeddings(1000), embeddings(1000, seed=1), ids, ids)["chance"]
    assert chance["txt_r1"] == pytest.approx(0.1)
    assert chance["img_r10"] == pytest.approx(1.0)
    assert chance["txt_meanr"] == pytest.approx(500.5)
    assert chance["txt_medr"] == 500


def test_chance_of_five_captions_is_that_of_random_scores() -> None:
    image_ids = torch.arange(40)
    text_ids = image_ids.repeat_interleave(5)
    runs = []
    for seed in range(60):
        image, text = embeddings(40, 32, 2 * seed), embeddings(200, 32, 2 * seed + 1)
        runs.append(retrieval_metrics(image, text, image_ids, text_ids))
    for name in UNTIED:
        mean = statistics.mean(run[name] for run in runs)
        spread = statistics.stdev(run[name] for run in runs) / len(runs) ** 0.5
        assert abs(mean - runs[0]["chance"][name]) < 4 * spread + 0.5 * name.endswith("medr"), name


def test_same_caption_of_two_images_counts_half() -> None:
    image = torch.eye(3)
    text = torch.eye(3)[[0, 0, 2]]  # images 0 and 1 share the caption that fits image 0
    image[1] = image[0]
    metrics = retrieval_metrics(image, text, torch.arange(3), torch.arange(3))
    assert metrics["txt_r1"] == pytest.approx(100 * (0.5 + 0.5 + 1) / 3)
    assert metrics["txt_r5"] == pytest.approx(100)
    assert metrics["txt_meanr"] == pytest.approx((1.5 + 1.5 + 1) / 3)


def test_pooled_texts(device: torch.device) -> None:
    image_ids = torch.tensor([4, 7, 4, 2, 7])
    text_ids = torch.tensor([7, 2, 4, 7, 2, 4, 7])
    image, text = embeddings(5), embeddings(7, seed=1)
    arguments = (tensor.to(device) for tensor in (image, text, image_ids, text_ids))
    metrics = retrieval_metrics(*arguments, pool_texts="mean")
    concepts = torch.tensor([2, 4, 7])
    pooled = torch.stack([text[text_ids == c].mean(0) for c in concepts])
    pooled = pooled / pooled.norm(dim=-1, keepdim=True)
    expected = brute_force(image, pooled, image_ids, concepts, "txt")
    expected |= brute_force(pooled, image, concepts, image_ids, "img")
    assert {k: metrics[k] for k in expected} == pytest.approx(expected)
    assert metrics["num_texts"] == metrics["num_ids"] == 3
    got, ids = pool_by_id(text, text_ids)
    torch.testing.assert_close(got, pooled)
    assert torch.equal(ids, concepts)


def test_shortlist_is_the_best_candidates() -> None:
    ids = torch.arange(9)
    image, text = embeddings(9), embeddings(9, seed=1)
    txt, img = retrieval_ranks(image, text, ids, ids, topk=4, chunk=20)
    for ranks, scores in ((txt, image @ text.T), (img, text @ image.T)):
        expected = scores.sort(dim=1, descending=True)
        torch.testing.assert_close(ranks.top_scores, expected.values[:, :4])
        assert torch.equal(ranks.top_rows, expected.indices[:, :4])
    assert retrieval_ranks(image, text, ids, ids, topk=99)[0].top_rows.shape == (9, 9)


def test_half_precision_embeddings_are_scored_in_fp32() -> None:
    ids = torch.arange(50)
    image, text = embeddings(50, 64).bfloat16(), embeddings(50, 64, seed=1).bfloat16()
    low = retrieval_metrics(image, text, ids, ids)
    assert low == retrieval_metrics(image.float(), text.float(), ids, ids)


def test_shares_of_the_queries_join_to_the_whole() -> None:
    ids = torch.arange(10)
    image, text = embeddings(10), embeddings(10, seed=1)
    whole = rank_queries(image, text, ids, ids)
    shares = [rank_queries(image[rank::2], text, ids[rank::2], ids) for rank in (0, 1)]
    mean = sum(share.mean_rank() for share in shares) / 2
    assert mean == pytest.approx(whole.mean_rank())
    assert recall_metrics(whole, whole)["txt_r1"] == pytest.approx(
        50 * sum(share.recall(1) for share in shares)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": embeddings(3)[:0], "image_ids": torch.arange(0)}, "image_embeddings is empty"),
        ({"image_ids": torch.arange(2)}, r"image_ids \(N,\), got \(3, 6\) and \(2,\)"),
        ({"text": embeddings(3, 5)}, r"one width, got \(3, 6\) and \(3, 5\)"),
        ({"text": torch.full((3, 6), torch.nan)}, "text_embeddings holds NaN"),
        ({"text_ids": torch.tensor([0, 1, 8])}, "1 of 3 queries have no candidate.* id 2"),
        ({"pool_texts": "max"}, "pool_texts: expected 'none' or 'mean', got 'max'"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    arguments = {
        "image": embeddings(3),
        "text": embeddings(3, seed=1),
        "image_ids": torch.arange(3),
        "text_ids": torch.arange(3),
        "pool_texts": "none",
    } | change
    pool_texts = arguments.pop("pool_texts")
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(*arguments.values(), pool_texts=pool_texts)
