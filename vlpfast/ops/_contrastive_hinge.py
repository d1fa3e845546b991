"""Hinge losses over tiles of similarities: VSE++ needs the best negative of each row and column and
no product for its gradient, VSE0 sums all of them.

Letters: N columns of a tile, here the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlpfast.ops._contrastive_dist import OneProcess
from vlpfast.ops._contrastive_passes import Passes
from vlpfast.ops._contrastive_products import add_product, row_dots
from vlpfast.ops._contrastive_tiles import Sweep, Tile


def hinge_chunked(
    image: Tensor,
    text: Tensor,
    ids: Tensor | None,
    margin: float,
    hardest: bool,
    passes: Passes,
    wants_image: bool,
    wants_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), fp32, and its gradients in the features' dtype, empty where not wanted."""
    run = _hardest if hardest else _all
    loss, grads = run(image, text, ids, margin, passes, (wants_image, wants_text))
    empty = lambda: image.new_empty(0)
    return (loss, *(empty() if grad is None else grad.to(image.dtype) for grad in grads))


def _tiles(image: Tensor, text: Tensor, ids: Tensor | None, trained: bool) -> list[Tile]:
    batch = OneProcess(image.shape[0]).candidates(text, trained)
    sweep = Sweep(image, None, batch, None, ids, ids, None, 0)
    return sweep.tiles(slice(0, image.shape[0]), with_grad=True)


def _hardest(
    image: Tensor, text: Tensor, ids: Tensor | None, margin: float, passes: Passes,
    wants: tuple[bool, bool],
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """VSE++. Nothing but the best negative matters, so it is found without the loss, and the loss
    is then made from features alone.
    """
    B = image.shape[0]
    best = image.new_full((2, B, 1), -torch.inf, dtype=torch.float32)
    place = image.new_full((2, B, 1), -1, dtype=torch.int64)
    one = torch.ones((), device=image.device)
    for tile in _tiles(image, text, ids, trained=False):
        row_ids, col_ids, _, offset = tile.pairs
        passes.negatives(
            tile.sims, one, None, 0, tile.rows.start, 0, row_ids, col_ids, offset,
            best[0, tile.rows], place[0, tile.rows], best[1], place[1],
        )  # fmt: skip
    found = (place >= 0).squeeze(2)
    text_place, image_place = place.squeeze(2).clamp(min=0)
    if B == 0:
        return best.new_zeros(()), [torch.zeros_like(x) if w else None
                                    for x, w in zip((image, text), wants, strict=True)]  # fmt: skip
    pair = row_dots(image, text)
    cost = torch.stack(
        [row_dots(image, text[text_place]) - pair, row_dots(image[image_place], text) - pair]
    )
    cost = torch.where(found, (cost + margin).clamp(min=0), 0)
    return cost.sum(), _hardest_grads(image, text, text_place, image_place, cost > 0, wants)


def _hardest_grads(
    image: Tensor, text: Tensor, text_place: Tensor, image_place: Tensor, active: Tensor,
    wants: tuple[bool, bool],
) -> list[Tensor | None]:  # fmt: skip
    """A triplet that costs pulls its pair together and pushes its negative away."""
    text_active, image_active = active.float()[..., None]
    pulls = text_active + image_active
    grads: list[Tensor | None] = []
    for wanted, mine, other, own_negative, own_active, other_place, other_active in (
        (wants[0], image, text, text_place, text_active, image_place, image_active),
        (wants[1], text, image, image_place, image_active, text_place, text_active),
    ):
        if not wanted:
            grads.append(None)
            continue
        grad = own_active * other[own_negative].float() - pulls * other.float()
        # Several rows may share a hardest negative: added up in the order of rows.
        grad.index_put_((other_place,), other_active * other.float(), accumulate=True)
        grads.append(grad)
        del mine
    return grads


def _all(
    image: Tensor, text: Tensor, ids: Tensor | None, margin: float, passes: Passes,
    wants: tuple[bool, bool],
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """VSE0: one look gives losses and, in place of similarities, how often each pair costs."""
    pair = row_dots(image, text)
    row_loss, row_count, col_count = torch.zeros_like(pair).expand(3, -1).clone()
    zeros = lambda x, wanted: torch.zeros_like(x, dtype=torch.float32) if wanted else None
    grads = [zeros(x, wanted) for x, wanted in zip((image, text), wants, strict=True)]
    for tile in _tiles(image, text, ids, trained=False):
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
