"""Masking of texts and patches: rates, what is never masked, independence of the batch."""

import math

import pytest
import torch

from vlpfast.data.masking import mask_patches, mask_patches_evenly, mask_text
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.ops.reference.counter import draw, stream, uniform
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


def masks_of(ids: torch.Tensor, side: int) -> torch.Tensor:
    """(B, side, side) bool."""
    mask = torch.zeros(len(ids), side * side, dtype=torch.bool)
    return mask.scatter(1, ids, True).unflatten(1, (side, side))


@pytest.mark.parametrize(("side", "num_hidden"), [(14, 75), (8, 24), (2, 3), (1, 1), (3, 9)])
def test_patches_are_as_many_as_asked_for_in_blocks(side, num_hidden):
    ids = mask_patches(num_hidden, side, seed=3, positions=torch.arange(400))
    assert ids.shape == (400, num_hidden)
    assert ids.min() >= 0
    assert ids.max() < side * side
    assert (ids.diff(dim=1) > 0).all()
    if side < 8:
        return
    masks = masks_of(ids, side)
    # Of hidden patches' right neighbours, far more are hidden than of patches hidden one by one.
    together = (masks[:, :, :-1] & masks[:, :, 1:]).sum() / masks[:, :, :-1].sum()
    assert together > 0.75
    assert (masks.float().mean(0) > 0.02).all()
    assert len(ids.unique(dim=0)) > 300


def test_patches_by_loops():
    """BEiT's algorithm from the same numbers: rectangle after rectangle, patch after patch."""
    side, num_hidden, positions = 14, 75, torch.tensor([0, 7, 123456789012])
    ids = mask_patches(num_hidden, side, seed=11, positions=positions)
    for row, position in zip(ids.tolist(), positions, strict=True):
        key, hidden = stream(11, position), []
        number = lambda n, key=key: uniform(draw(key, torch.tensor((0x14 << 24) + n)))
        for rectangle in range(24):
            share, shape, top, left = (number(24 * i + rectangle) for i in range(4))
            area, aspect = 16 + share * (75 - 16), ((2 * shape - 1) * math.log(1 / 0.3)).exp()
            height = min(side, max(1, int((area * aspect).sqrt().round())))
            width = min(side, max(1, int((area / aspect).sqrt().round())))
            top, left = int(top * (side - height + 1)), int(left * (side - width + 1))
            for y in range(top, top + height):
                for x in range(left, left + width):
                    if y * side + x not in hidden and len(hidden) < num_hidden:
                        hidden.append(y * side + x)
        assert sorted(hidden) == row


def test_patches_depend_on_seed_and_place_alone():
    positions = torch.tensor([5, 9, 5])
    ids = mask_patches(24, 8, seed=3, positions=positions)
    assert ids[0].equal(ids[2])
    assert not ids[0].equal(ids[1])
    assert ids.equal(mask_patches(24, 8, seed=3, positions=positions.numpy()))
    assert ids[1:2].equal(mask_patches(24, 8, seed=3, positions=positions[1:2]))
    assert not ids.equal(mask_patches(24, 8, seed=4, positions=positions))
    with pytest.raises(ValueError, match=r"num_hidden must be in \[1, 64\], got 65"):
        mask_patches(65, 8, seed=3, positions=positions)


def test_any_number_of_any_patches():
    """Over 9,000 images of 9 patches, numbers from 1 to 9 and the patches themselves are uniform to
    5 sigma; ids ascend, none is there twice, and what is left is -1.
    """
    images, patches = 9_000, 9
    ids = mask_patches_evenly(patches, seed=3, positions=torch.arange(images))
    assert ids.shape == (images, patches)
    counts = (ids >= 0).sum(1)
    assert ((ids >= 0) == (torch.arange(patches) < counts[:, None])).all()
    inside = (ids[:, 1:] >= 0).flatten()
    assert (ids.diff(dim=1).flatten()[inside] > 0).all()
    numbers = counts.bincount(minlength=patches + 1)
    assert numbers[0] == 0
    spread = 5 * (images / patches) ** 0.5
    assert ((numbers[1:] - images / patches).abs() < spread).all()
    of_each = ids[ids >= 0].bincount(minlength=patches)
    assert ((of_each - of_each.float().mean()).abs() < 5 * (images / 4) ** 0.5).all()


def test_even_masks_are_of_places_in_the_stream():
    positions = torch.tensor([7, 8, 1 << 40])
    ids = mask_patches_evenly(16, seed=3, positions=positions)
    assert ids.equal(mask_patches_evenly(16, seed=3, positions=positions.numpy()))
    assert ids[1:2].equal(mask_patches_evenly(16, seed=3, positions=positions[1:2]))
    assert not ids.equal(mask_patches_evenly(16, seed=4, positions=positions))
    assert mask_patches_evenly(1, seed=0, positions=positions).tolist() == [[0]] * 3
