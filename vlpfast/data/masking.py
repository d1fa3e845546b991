"""What masked modelling hides of texts and regions, a function of (seed, place in the stream,
token).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vlpfast.data.tokenizer import Tokenizer
from vlpfast.ops.reference.counter import draw, stream, uniform
from vlpfast.ragged import Ragged
from vlpfast.regions import Regions

IGNORE_INDEX = -100
# Upper bits of the counter, so that the three numbers of a token are distinct draws of its row's
# stream.
_SELECT, _REPLACE, _RANDOM_ID, _REGION = (purpose << 24 for purpose in (0x10, 0x11, 0x12, 0x13))


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


def _choose(
    bits: Tensor, row_ids: Tensor, maskable: Tensor, num_rows: int, probability: float
) -> Tensor:
    """Which maskable tokens are chosen: those whose number is small, or the smallest of its row."""
    smallest = torch.full((num_rows,), 1 << 32, device=bits.device)
    smallest = smallest.scatter_reduce(0, row_ids[maskable], bits[maskable], "amin")
    return maskable & ((uniform(bits) < probability) | (bits == smallest[row_ids]))
