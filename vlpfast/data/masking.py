"""What masked modelling hides of texts, regions and patches, a function of (seed, place in the
stream, token).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vlpfast.data.tokenizer import Tokenizer
from vlpfast.ops.reference.counter import draw, stream, uniform
from vlpfast.ragged import Ragged
from vlpfast.regions import Regions

IGNORE_INDEX = -100
# Upper bits of the counter, so that the numbers of a token are distinct draws of its row's stream.
_SELECT, _REPLACE, _RANDOM_ID, _REGION, _RECTANGLE, _PATCH, _COUNT = (
    purpose << 24 for purpose in (0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16)
)
# Of patches: rectangles drawn for each image, far more than are needed; the least share of an image
# that one covers (16 of 196 patches), and its flattest shape, height over width.
_NUM_RECTANGLES, _LEAST_SHARE, _FLATTEST = 24, 16 / 196, 0.3


def mask_text(
    text: Ragged,
    tokenizer: Tokenizer,
    *,
    probability: float = 0.15,
    whole_word: bool = False,
    seed: int,
    positions: Tensor | np.ndarray,
) -> tuple[Ragged, Tensor]:
    """Hides tokens for MLM: of the chosen ones 80 % become [MASK], 10 % a random token, 10 % stay.

    A token (with `whole_word`: a word) is chosen where its uniform number is < `probability`, or is
    the smallest of its text; so at least one is chosen in each text that has an ordinary token.
    Special tokens never are.

    Args:
        text: packed ids of B texts, int64.
        tokenizer: gives the special ids, the mask id and where words begin.
        probability: share of chosen tokens, in (0, 1].
        whole_word: choose all pieces of a word together.
        seed: of the run.
        positions (B,): int64 place of each text in the training stream.

    Returns: the masked text, and labels (T,) int64: the original id where a token was chosen, else
    -100.

    Source: Devlin et al. 2019 (BERT), section 3.1, arXiv:1810.04805. Deviation: at least one token
    per text.
    """
    if tokenizer.mask_id is None:
        raise ValueError("masking needs a tokenizer with a mask token; CLIP's vocabulary has none")
    if not 0 < probability <= 1:
        raise ValueError(f"probability must be in (0, 1], got {probability}")
    ids, device = text.values, text.values.device
    positions = torch.as_tensor(positions, device=device)
    if positions.shape != (len(text),):
        raise ValueError(f"positions must be ({len(text)},), got {tuple(positions.shape)}")
    special = torch.zeros(tokenizer.vocab_size, dtype=torch.bool, device=device)
    special[list(tokenizer.special_ids)] = True
    ordinary_ids = (~special).nonzero()[:, 0]

    row_ids, places = text.row_ids(), text.positions()
    keys = stream(seed, positions)[row_ids]
    unit_places = places
    if whole_word:
        begins = torch.from_numpy(tokenizer.word_starts).to(device)[ids] | (places == 0)
        # Running count of word beginnings -> place of the token that begins this token's word.
        unit_places = places[begins][begins.cumsum(0) - 1]
    bits = draw(keys, unit_places + _SELECT)
    maskable = ~special[ids]
    chosen = _choose(bits, row_ids, maskable, len(text), probability)

    kind = uniform(draw(keys, places + _REPLACE))
    random_ids = ordinary_ids[(draw(keys, places + _RANDOM_ID) * len(ordinary_ids)) >> 32]
    replaced = torch.where(kind < 0.8, tokenizer.mask_id, torch.where(kind < 0.9, random_ids, ids))
    labels = torch.where(chosen, ids, IGNORE_INDEX)
    return text.with_values(torch.where(chosen, replaced, ids)), labels


def mask_regions(
    regions: Regions, *, probability: float = 0.15, seed: int, positions: Tensor | np.ndarray
) -> Regions:
    """`regions` with some hidden: each with `probability`, and at least one of each image.

    Args:
        regions: of B images.
        probability: in (0, 1].
        seed: of the run.
        positions (B,): int64 place of each image in the training stream.

    Source: Chen et al. 2020 (UNITER), section 3.2, arXiv:1909.11740.
    """
    features = regions.features
    positions = torch.as_tensor(positions, device=features.values.device)
    if positions.shape != (len(regions),):
        raise ValueError(f"positions must be ({len(regions)},), got {tuple(positions.shape)}")
    row_ids = features.row_ids()
    bits = draw(stream(seed, positions)[row_ids], features.positions() + _REGION)
    every = torch.ones_like(bits, dtype=torch.bool)
    return regions.hide(_choose(bits, row_ids, every, len(regions), probability))


def mask_patches(
    num_hidden: int, side: int, *, seed: int, positions: Tensor | np.ndarray
) -> Tensor:
    """Which patches of square images are hidden: random rectangles, one after another, until there
    are `num_hidden`.

    The last rectangle is cut, by rows from its top. Areas are uniform between the least share and
    `num_hidden`, shapes log-uniform; what reaches over the border is moved inside.

    Args:
        num_hidden: patches to hide of each image, K in [1, side * side].
        side: patches along a side.
        seed: of the run.
        positions (B,): int64 place of each image in the training stream.

    Returns: (B, K) int64 ascending ids.

    Source: Bao et al. 2021 (BEiT), algorithm 1, arXiv:2106.08254. Deviation: a rectangle that would
    hide too many is cut, not drawn again.
    """
    if not 0 < num_hidden <= side * side:
        raise ValueError(f"num_hidden must be in [1, {side * side}], got {num_hidden}")
    keys = stream(seed, torch.as_tensor(positions))
    place = torch.arange(side * side, device=keys.device)
    numbers = torch.arange(4 * _NUM_RECTANGLES, device=keys.device) + _RECTANGLE
    drawn = uniform(draw(keys[:, None], numbers)).unflatten(1, (4, _NUM_RECTANGLES))
    share, shape, top, left = drawn.unbind(1)  # (B, rectangles) each
    least = min(_LEAST_SHARE * side * side, num_hidden)
    area = least + share * (num_hidden - least)
    aspect = torch.exp((2 * shape - 1) * -math.log(_FLATTEST))
    height, width = (
        extent.round().clamp(1, side).long()
        for extent in ((area * aspect).sqrt(), (area / aspect).sqrt())
    )
    top, left = ((at * (side - extent + 1)).long() for at, extent in ((top, height), (left, width)))
    y, x = place // side, place % side
    down, right = y - top[..., None], x - left[..., None]  # (B, rectangles, P)
    inside = (down >= 0) & (down < height[..., None]) & (right >= 0) & (right < width[..., None])
    # Each patch counts for the first rectangle over it; what none covers comes last, at random.
    covered = inside.any(1)
    order = torch.where(covered, inside.int().argmax(1), _NUM_RECTANGLES) * (1 << 32)
    order = order + torch.where(covered, place, draw(keys[:, None], place + _PATCH))
    chosen = order.argsort(dim=1, stable=True)[:, :num_hidden]
    return chosen.sort(1).values


def mask_patches_evenly(num_patches: int, *, seed: int, positions: Tensor | np.ndarray) -> Tensor:
    """Which patches of images are hidden: of each image a number that is uniform from 1 to all, of
    patches that are any.

    Args:
        num_patches: P.
        seed: of the run.
        positions (B,): int64 place of each image in the training stream.

    Returns: (B, P) int64, ascending ids of the hidden ones, then -1.

    Source: Cho et al. 2020 (X-LXMERT), section 4.2, arXiv:2009.11278; allenai/x-lxmert, option
    `vis_mask_predict`.
    """
    keys = stream(seed, torch.as_tensor(positions))[:, None]
    place = torch.arange(num_patches, device=keys.device)
    count = 1 + ((draw(keys, torch.full_like(keys, _COUNT)) * num_patches) >> 32)
    order = draw(keys, place + _PATCH).argsort(dim=1, stable=True)
    ids = torch.where(place < count, order, num_patches).sort(1).values
    return torch.where(ids < num_patches, ids, -1)


def _choose(
    bits: Tensor, row_ids: Tensor, maskable: Tensor, num_rows: int, probability: float
) -> Tensor:
    """Which maskable tokens are chosen: those whose number is small, or the smallest of its row."""
    smallest = torch.full((num_rows,), 1 << 32, device=bits.device)
    smallest = smallest.scatter_reduce(0, row_ids[maskable], bits[maskable], "amin")
    return maskable & ((uniform(bits) < probability) | (bits == smallest[row_ids]))
