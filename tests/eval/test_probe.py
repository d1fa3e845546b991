"""Probes on models whose answer is known: an oracle, one that is blind, one that looks wrongly."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vlpfast.data.batch import Batch
from vlpfast.eval.probe import binomial_interval, derange, mlm_probe, swap_probe
from vlpfast.ragged import Ragged

VOCAB = 40
SPECIAL = (0, 1, 2, 3)


class Words:
    """A tokenizer whose words are numbers: "7 9" is [start, 7, 9, end]."""

    vocab_size, special_ids = VOCAB, SPECIAL
    pad_id, start_id, end_id, mask_id = SPECIAL

    def encode(self, texts: list[str], max_tokens: int) -> list[list[int]]:
        return [
            [self.start_id, *map(int, text.split()[: max_tokens - 2]), self.end_id]
            for text in texts
        ]


class Seer(nn.Module):
    """Reads one number off the first pixel; predicts it as a word, and prefers captions by it.

    `blind` sees 0 in every image. The contrastive score is 1 for a caption that begins with the
    image's number, the matching score is 1 for one that ends with it.
    """

    def __init__(self, *, blind: bool = False, fusion: bool = True) -> None:
        super().__init__()
        self.blind, self.has_fusion = blind, fusion
        self.has_joint_space = True
        self.match_head = nn.Identity() if fusion else None
        self.config = SimpleNamespace(preset="seer", vision=SimpleNamespace(front="patches"))
        self.register_buffer("place", torch.tensor(1.0))

    @property
    def device(self) -> torch.device:
        return self.place.device

    def encode_image(self, images: Tensor) -> SimpleNamespace:
        number = images[:, 0, 0, 0].long() * (not self.blind)
        tokens = nn.functional.one_hot(number, VOCAB).float()
        return SimpleNamespace(tokens=tokens[:, None], embedding=tokens)

    def encode_text(self, text: Ragged) -> SimpleNamespace:
        tokens = nn.functional.one_hot(text.values, VOCAB).float()
        return SimpleNamespace(
            tokens=text.with_values(tokens), embedding=tokens[text.first() + 1].clone()
        )

    def image_keys(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]

    def fuse(self, text: Ragged, keys: Tensor, kv_index: Tensor) -> Ragged:
        seen = keys[kv_index][text.row_ids()]
        return text.with_values(torch.stack([text.values, seen], dim=1))

    def fuse_pairs(self, text: Ragged, keys: Tensor, kv_index: Tensor) -> Ragged:
        """What its `match` reads: text alone."""
        return self.fuse(text, keys, kv_index)

    def token_logits(self, hidden: Tensor) -> Tensor:
        return hidden[:, 1]

    def match(self, fused: Ragged) -> Tensor:
        caption, seen = fused.values[fused.last() - 1].unbind(1)
        agree = (caption * seen).sum(-1)
        return torch.stack([-agree, agree], dim=-1)


def batch(numbers: list[int], captions: list[str], ids: list[int] | None = None) -> Batch:
    images = torch.zeros(len(numbers), 2, 2, 3, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(numbers)
    samples = torch.arange(len(numbers))
    text = Ragged.from_lists(Words().encode(captions, 16))
    image_ids = torch.tensor(numbers if ids is None else ids)
    return Batch(images, text, image_ids, samples, samples)


def test_oracle_reads_masked_words_off_the_true_image_only(device: torch.device) -> None:
    numbers = [5, 6, 7, 8, 9, 10, 5, 6]
    batches = [batch(numbers, [f"{n} {n} {n}" for n in numbers])] * 2
    result = mlm_probe(Seer().to(device), batches, Words())
    assert result.metrics == {"mlm_accuracy": 100.0, "shuffled_mlm_accuracy": 0.0}
    assert result.counts["num_samples"] == 16
    assert result.counts["num_masked"] >= 16


def test_blind_model_scores_alike_with_any_image() -> None:
    numbers = [5, 6, 7, 8]
    result = mlm_probe(Seer(blind=True), [batch(numbers, ["4 4", "9 9", "4 4", "4 4"])], Words())
    assert result.metrics["mlm_accuracy"] == result.metrics["shuffled_mlm_accuracy"] == 0.0


def test_chance_is_the_most_frequent_masked_word() -> None:
    # One word a caption: each is masked, so the labels are known.
    captions = ["4", "4", "4", "9", "8"]
    result = mlm_probe(Seer(), [batch([5, 6, 7, 8, 9], captions)], Words())
    assert result.chance == {"mlm_accuracy": pytest.approx(60.0)}
    assert result.counts == {"num_samples": 5, "num_masked": 5}


def test_samples_without_another_image_are_left_out() -> None:
    # Three of the four show one thing; only one of them can be paired with the fourth.
    crowded = batch([5, 5, 5, 6], ["5", "5", "5", "6"])
    alone = batch([7], ["7"])
    result = mlm_probe(Seer(), [crowded, alone], Words())
    assert result.counts == {"num_samples": 2, "num_masked": 2}
    assert result.metrics == {"mlm_accuracy": 100.0, "shuffled_mlm_accuracy": 0.0}


def test_mlm_is_a_function_of_the_seed() -> None:
    batches = [batch([5, 6, 7], ["5 9 9 8 5 5 9", "6 6 6 8 9 9", "7 8 8 8 7"])]
    results = [mlm_probe(Seer(), batches, Words(), seed=seed) for seed in (1, 1, 2, 3, 4)]
    assert results[0] == results[1]
    assert len({str(result.metrics) for result in results}) > 1


@settings(deadline=None, max_examples=60)
@given(ids=st.lists(st.integers(0, 5), min_size=1, max_size=24), seed=st.integers(0, 3))
def test_derangement(ids: list[int], seed: int) -> None:
    image_ids = torch.tensor(ids)
    partner, differs = derange(image_ids, seed=seed)
    assert sorted(partner.tolist()) == list(range(len(ids)))
    assert differs.tolist() == [ids[p] != i for p, i in zip(partner.tolist(), ids, strict=True)]
    # Every sample gets another image unless one thing fills more than half of the batch.
    largest = max(map(ids.count, ids))
    assert int(differs.sum()) == min(len(ids), 2 * (len(ids) - largest))


def test_derangement_depends_on_the_seed() -> None:
    partners = {tuple(derange(torch.arange(8), seed=s)[0].tolist()) for s in range(4)}
    assert len(partners) > 1


class Records:
    """An index that holds only records."""

    def __init__(self, records: list[dict]) -> None:
        self.records = records

    def record(self, sample_id: int) -> dict:
        return self.records[sample_id]


# Image 5: contrast prefers the true caption, matching too; 6: only matching; 7: neither knows.
RECORDS = Records(
    [
        {"relational": "5 4 5", "swapped": "4 5 4"},
        {"relational": "4 5 6", "swapped": "6 5 4"},
        {"relational": "8 9", "swapped": "9 8"},
        {"relational": "8 9", "swapped": None},
        {"relational": "8 9", "swapped": "8 9"},
        {"captions": ["8 9"]},
    ]
)
NUMBERS = [5, 6, 7, 8, 8, 8]


def test_swap_counts_wins_and_halves_of_ties(device: torch.device) -> None:
    batches = [batch(NUMBERS, ["4"] * 6)]
    result = swap_probe(Seer().to(device), batches, RECORDS, Words(), max_tokens=16)
    assert result.counts == {"num_pairs": 3}
    assert result.metrics["swap_accuracy"] == pytest.approx(100 * (1 + 0 + 0.5) / 3)
    assert result.metrics["itm_swap_accuracy"] == pytest.approx(100 * (1 + 1 + 0.5) / 3)
    assert result.chance == {"swap_accuracy": 50.0}
    low, high = result.intervals["itm_swap_accuracy"]
    assert low < result.metrics["itm_swap_accuracy"] < high


def test_swap_of_a_blind_model_is_chance() -> None:
    result = swap_probe(
        Seer(blind=True), [batch(NUMBERS, ["4"] * 6)], RECORDS, Words(), max_tokens=16
    )
    assert result.metrics == {"swap_accuracy": 50.0, "itm_swap_accuracy": 50.0}


def test_swap_without_fusion_measures_contrast_only() -> None:
    result = swap_probe(
        Seer(fusion=False), [batch(NUMBERS, ["4"] * 6)], RECORDS, Words(), max_tokens=16
    )
    assert result.metrics == {"swap_accuracy": pytest.approx(50.0)}


@pytest.mark.parametrize(
    ("percent", "num", "low", "high"),
    # scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    [(50.0, 100, 40.383, 59.617), (90.0, 20, 69.897, 97.213), (0.0, 10, 0.0, 27.753)],
)
def test_binomial_interval(percent: float, num: int, low: float, high: float) -> None:
    assert binomial_interval(percent, num) == pytest.approx((low, high), abs=2e-3)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="mlm needs a model with a fusion tower; preset 'seer'"):
        mlm_probe(Seer(fusion=False), [], Words())
    with pytest.raises(ValueError, match="mlm: no masked token with two images"):
        mlm_probe(Seer(), [], Words())
    with pytest.raises(ValueError, match="no record has both a 'relational' and a different"):
        swap_probe(Seer(), [batch([8], ["4"])], Records([{}]), Words(), max_tokens=16)
