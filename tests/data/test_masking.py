"""MLM masking: rates, what is never masked, independence of the batch."""

import pytest
import torch

from vlpfast.data.masking import mask_text
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.ragged import Ragged

WORDS = "circle square left right above yellow purple striped tiny enormous zxcvbnm qwertyuiop"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([WORDS] * 2, 300)


@pytest.fixture(scope="module")
def text(tokenizer) -> Ragged:
    words = WORDS.split()
    captions = [" ".join(words[(i * k) % 12] for k in range(1, 2 + i % 9)) for i in range(600)]
    return Ragged.from_lists(tokenizer.encode(captions, 24))


def test_rates(tokenizer, text):
    masked, labels = mask_text(text, tokenizer, seed=1, positions=torch.arange(600))
    chosen = labels >= 0
    ordinary = text.values > 3
    num_chosen = chosen.sum().item()
    # A few more than 15 %: at least one in each text.
    assert 0.15 < num_chosen / ordinary.sum().item() < 0.20
    hidden = (masked.values[chosen] == tokenizer.mask_id).float().mean().item()
    same = (masked.values[chosen] == text.values[chosen]).float().mean().item()
    # Three standard deviations of a share of n draws: 3 * sqrt(0.16 / n).
    tolerance = 3 * (0.16 / num_chosen) ** 0.5
    assert hidden == pytest.approx(0.8, abs=tolerance)
    assert same == pytest.approx(0.1, abs=tolerance)
    replaced = masked.values[chosen]
    assert ((replaced == tokenizer.mask_id) | (replaced > 3)).all()


def test_only_labels_change(tokenizer, text):
    before = text.values.clone()
    masked, labels = mask_text(text, tokenizer, seed=1, positions=torch.arange(600))
    kept = labels < 0
    assert text.values.equal(before)
    assert masked.values[kept].equal(text.values[kept])
    assert labels[~kept].equal(text.values[~kept])
    assert (labels[kept] == -100).all()
    assert (labels[text.values <= 3] == -100).all()


@pytest.mark.parametrize("probability", [1e-6, 0.15, 1.0])
@pytest.mark.parametrize("whole_word", [False, True])
def test_at_least_one_where_possible(tokenizer, probability, whole_word):
    captions = ["circle", "", "left right", "qwertyuiop square"]
    text = Ragged.from_lists(tokenizer.encode(captions, 24))
    _, labels = mask_text(
        text,
        tokenizer,
        probability=probability,
        whole_word=whole_word,
        seed=3,
        positions=torch.arange(4),
    )
    chosen = (labels >= 0).long()
    counts = torch.zeros(4, dtype=torch.int64).index_add(0, text.row_ids(), chosen)
    assert (counts > 0).tolist() == [True, False, True, True]
    if probability == 1.0:
        assert counts.equal(text.lens.long() - 2)


def test_does_not_depend_on_the_batch(tokenizer, text):
    positions = torch.arange(600) + 2**33
    masked, labels = mask_text(text, tokenizer, seed=1, positions=positions)
    rows = torch.tensor([599, 3, 77])
    some, some_labels = mask_text(
        text.select(rows), tokenizer, seed=1, positions=positions[rows].numpy()
    )
    token_ids, _ = text.token_ids_of(rows)
    assert some.values.equal(masked.values[token_ids])
    assert some_labels.equal(labels[token_ids])


def test_seeds_and_positions_differ(tokenizer, text):
    _, labels = mask_text(text, tokenizer, seed=1, positions=torch.arange(600))
    for seed, shift in ((2, 0), (1, 600), (1, 2**32)):
        _, other = mask_text(text, tokenizer, seed=seed, positions=torch.arange(600) + shift)
        both = ((labels >= 0) & (other >= 0)).sum() / (labels >= 0).sum()
        assert both < 0.35


def test_whole_words(tokenizer, text):
    _, labels = mask_text(
        text, tokenizer, whole_word=True, probability=0.3, seed=1, positions=torch.arange(600)
    )
    starts = torch.from_numpy(tokenizer.word_starts)[text.values]
    continues = (~starts).nonzero()[:, 0]
    assert len(continues) > 1000
    chosen = labels >= 0
    assert chosen[continues].equal(chosen[continues - 1])
    _, pieces = mask_text(text, tokenizer, probability=0.3, seed=1, positions=torch.arange(600))
    assert not (pieces >= 0)[continues].equal((pieces >= 0)[continues - 1])


def test_bad_arguments_are_named(tokenizer, text):
    with pytest.raises(ValueError, match="probability"):
        mask_text(text, tokenizer, probability=0.0, seed=0, positions=torch.arange(600))
    with pytest.raises(ValueError, match=r"positions must be \(600,\)"):
        mask_text(text, tokenizer, seed=0, positions=torch.arange(3))
