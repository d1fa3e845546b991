"""Hinge losses over tiles of similarities. VSE++ takes from them the hardest negative of each row
and column alone, VSE0 sums all of them; gradients are made in the forward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vlpfast.ops._contrastive_dist import OneProcess
from vlpfast.ops._contrastive_passes import Passes
from vlpfast.ops._contrastive_products import add_product, row_dots, zeros
from vlpfast.ops._contrastive_tiles import Sweep, Tile

Grads = tuple[Tensor | None, Tensor | None]


def hinge_chunked(
    image: Tensor,
    text: Tensor,
    ids: Tensor | None,
    margin: float,
    hardest: bool,
    passes: Passes,
    wants: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), fp32, and its gradients in the features' dtype, empty where not wanted."""
    run = _hardest if hardest else _every
    loss, grads = run(image, text, ids, margin, passes, wants)
    image_grad, text_grad = (
        image.new_empty(0) if grad is None else grad.to(image.dtype) for grad in grads
    )
    return loss, image_grad, text_grad


def _tiles(image: Tensor, text: Tensor, ids: Tensor | None) -> Iterator[Tile]:
    batch = OneProcess(image.shape[0]).candidates(text, trained=False)
    sweep = Sweep(image, None, batch, None, ids, ids, None, 0)
    return sweep.tiles(slice(0, image.shape[0]), with_grad=False)


def _hardest(
    image: Tensor,
    text: Tensor,
    ids: Tensor | None,
    margin: float,
    passes: Passes,
    wants: tuple[bool, bool],
) -> tuple[Tensor, Grads]:
    """VSE++: finds the negatives, then makes their costs from features, without tiles' rounding."""
    B = image.shape[0]
    best = image.new_full((2, B, 1), -torch.inf, dtype=torch.float32)
    place = image.new_full((2, B, 1), -1, dtype=torch.int64)
    scale = torch.ones((), device=image.device)
    for tile in _tiles(image, text, ids):
        row_ids, col_ids, _, offset = tile.pairs
        passes.negatives(
            tile.sims, scale, None, 0, tile.rows.start, 0, row_ids, col_ids, offset,
            best[0, tile.rows], place[0, tile.rows], best[1], place[1],
        )  # fmt: skip
    # One pair that differs from another gives every row a negative.
    others = torch.arange(B, device=image.device) if ids is None else ids
    exists = (others != others[:1]).any()
    hard_text, hard_image = place[..., 0].clamp(min=0)
    pair = row_dots(image, text)
    hard = torch.stack([row_dots(image, text[hard_text]), row_dots(image[hard_image], text)])
    # No place is found among negatives that are all NaN: that is no cost of 0.
    hard = torch.where(place[..., 0] >= 0, hard, torch.nan)
    cost = torch.where(exists, (margin + hard - pair).clamp(min=0), 0)
    text_active, image_active = torch.where(cost.isnan(), cost, (cost > 0).float())[..., None]
    pulls = text_active + image_active
    image_grad = text_grad = None
    if wants[0]:
        image_grad = _triplets(text, pulls, hard_text, text_active, hard_image, image_active)
    if wants[1]:
        text_grad = _triplets(image, pulls, hard_image, image_active, hard_text, text_active)
    return cost.sum(), (image_grad, text_grad)


def _triplets(
    other: Tensor,
    pulls: Tensor,
    negative: Tensor,
    active: Tensor,
    is_negative_of: Tensor,
    other_active: Tensor,
) -> Tensor:
    """Gradient of one tower: each triplet that costs pulls its pair together and pushes its
    negative away, whichever of the two this tower's row is.
    """
    grad = active * other[negative].float() - pulls * other.float()
    # Several triplets may share a negative; they are added in the order of rows.
    return grad.index_put_((is_negative_of,), other_active * other.float(), accumulate=True)


def _every(
    image: Tensor,
    text: Tensor,
    ids: Tensor | None,
    margin: float,
    passes: Passes,
    wants: tuple[bool, bool],
) -> tuple[Tensor, Grads]:
    """VSE0: one look gives losses and, in place of similarities, how often each pair costs."""
    pair = row_dots(image, text)
    row_loss, row_count, col_count = (torch.zeros_like(pair) for _ in range(3))
    grads = tuple(zeros(image.shape, image) if wanted else None for wanted in wants)
    for tile in _tiles(image, text, ids):
        row_ids, col_ids, _, offset = tile.pairs
        rows = tile.rows
        passes.hinge(
            tile.sims, row_ids, col_ids, offset, pair[rows], pair, margin,
            row_loss[rows], row_count[rows], col_count,
        )  # fmt: skip
        if grads[0] is not None:
            add_product(grads[0][rows], tile.sims, text)
        if grads[1] is not None:
            add_product(grads[1], tile.sims.T, image[rows])
    pulls = (row_count + col_count)[:, None]
    for grad, other in zip(grads, (text, image), strict=True):
        if grad is not None:
            grad.sub_(pulls * other.float())
    return row_loss.sum(), grads
