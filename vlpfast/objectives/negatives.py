"""Hard negatives of matching over the pairs of all ranks: who draws whom, and the chosen rows alone
brought to where they are read.

Letters: G pairs of all ranks, in rank order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vlpfast.objectives.passes import Passes
from vlpfast.ops._collectives import exchange_rows, start_gather
from vlpfast.ops.reference.counter import draw, stream
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged

# Candidates that a draw has in memory at once: (B, 4096) similarities.
_COLUMNS = 4096


class _Pairs(NamedTuple):
    """Embeddings (G, E), image ids (G,) and places in the stream (G,)."""

    image: Tensor
    text: Tensor
    ids: Tensor
    positions: Tensor


class _Route(NamedTuple):
    """Rows (n,) int64 that this rank sends, and how many to each rank and from each; what arrives
    stands at `places` (B,) int64 for those who asked.
    """

    rows: Tensor
    sent: list[int]
    received: list[int]
    places: Tensor


def over_ranks(passes: Passes, seed: int) -> Passes:
    """A negative text of each image and a negative image of each text, of the pairs of all ranks
    whose id differs, drawn from the softmax of the scaled similarities; and what the fusion reads
    of them: encoded texts and image tokens, with their gradients.

    A rank receives B texts and B images, whatever the number of ranks; embeddings and a few
    numbers of all G pairs are gathered. The host waits once, for who wants what.

    Args:
        passes: with the towers' outputs; every rank has as many pairs.
        seed: the same on every rank; with places in the stream it decides the draws, which so do
            not depend on how pairs are split over ranks.

    Returns: passes that have the negatives, those texts and images, and the keys of all.

    Source: Li et al. 2022 (BLIP), salesforce/BLIP models/blip_retrieval.py, `negative_all_rank`.
    Deviation: there, all image tokens are gathered.
    """
    every, group, size = _every_pair(passes), passes.group, len(passes.batch)
    own = _Pairs(
        passes.image_embedding.detach(),
        passes.text_embedding.detach(),
        passes.batch.image_ids,
        passes.batch.positions,
    )
    scale = passes.model.logit_scale.detach()
    texts = _draw(scale * own.image, every.text, own, every, fold_seed(seed, 0))
    images = _draw(scale * own.text, every.image, own, every, fold_seed(seed, 1))
    if group is None:
        return replace(passes, hard_text=texts, hard_image=images)
    here = dist.get_rank(group) * size + torch.arange(size, device=texts.device)
    wanted = torch.stack([torch.where(drawn < 0, here, drawn) for drawn in (texts, images)])
    passes, places = _fetch(passes, wanted)
    rows = [
        torch.where(drawn < 0, drawn, place + size * count)
        for drawn, place, count in zip(
            (texts, images), places, map(len, (passes.plan.texts, passes.plan.images)), strict=True
        )
    ]
    return replace(passes, hard_text=rows[0], hard_image=rows[1])


def _every_pair(passes: Passes) -> _Pairs:
    own = (passes.image_embedding, passes.text_embedding)
    numbers = (passes.batch.image_ids, passes.batch.positions)
    if passes.group is None:
        return _Pairs(*(x.detach() for x in own), *numbers)
    counts = [len(passes.batch)] * dist.get_world_size(passes.group)
    parts = [torch.stack(own, 1), torch.stack(numbers, 1)]
    # Both are under way before either is waited for.
    waits = [start_gather(part, counts, passes.group) for part in parts]
    return _Pairs(*(x for wait in waits for x in wait().unbind(1)))


def _draw(query: Tensor, candidates: Tensor, own: _Pairs, every: _Pairs, seed: int) -> Tensor:
    """(B,) columns of softmax(query @ candidates^T), of another id, by Gumbel-max; -1: none."""
    keys = stream(seed, own.positions)[:, None]
    full = torch.autocast(query.device.type, enabled=False)
    best = query.new_full((query.shape[0],), -torch.inf)
    chosen = torch.full_like(own.ids, -1)
    for first in range(0, candidates.shape[0], _COLUMNS):
        block = slice(first, first + _COLUMNS)
        bits = draw(keys, every.positions[block])
        # 23 bits and a half: u is neither 0 nor 1 in fp32, so the noise is finite.
        u = ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23
        with full:
            noisy = query @ candidates[block].T - (-u.log()).log()
        score, column = noisy.masked_fill(own.ids[:, None] == every.ids[block], -torch.inf).max(1)
        chosen = torch.where(score > best, column + first, chosen)
        best = torch.maximum(score, best)
    return chosen


def _fetch(passes: Passes, wanted: Tensor) -> tuple[Passes, list[Tensor]]:
    """Passes with the texts and images `wanted` (2, B) of all ranks, and where these are among what
    was fetched: (B,) each.
    """
    student, size, group = passes.student, len(passes.batch), passes.group
    parts = [student.text.tokens, student.image.tokens]
    lens = [
        part.lens[:size] if isinstance(part, Ragged) else torch.zeros_like(wanted[0])
        for part in parts
    ]
    numbers = torch.stack([*wanted, *lens])
    # (ranks, 4, B) on the host, whose word the collectives' sizes are.
    known = start_gather(numbers[None], [1] * dist.get_world_size(group), group)().cpu()
    fetched, places = [], []
    for number, part in enumerate(parts):
        route = _route(known[:, number], dist.get_rank(group), wanted.device)
        fetched.append(_exchange(part, route, known[:, 2 + number], known[:, number], group))
        places.append(route.places)
    text = Ragged.cat([student.text.tokens, fetched[0]])
    both = Ragged if isinstance(parts[1], Ragged) else torch
    keys = passes.model.image_keys(both.cat([parts[1], fetched[1]]))
    student = replace(student, text=replace(student.text, tokens=text), keys=keys)
    return replace(passes, student=student), places


def _route(wanted: Tensor, rank: int, device: torch.device) -> _Route:
    """`wanted` (ranks, B), on the host: the pairs that each rank asks for."""
    ranks, size = wanted.shape
    owners = wanted // size
    mine = owners == rank
    order = owners[rank].argsort(stable=True)
    return _Route(
        (wanted[mine] % size).to(device),
        mine.sum(1).tolist(),
        owners[rank].bincount(minlength=ranks).tolist(),
        order.argsort().to(device),
    )


def _exchange(
    part: Tensor | Ragged, route: _Route, lens: Tensor, wanted: Tensor, group: dist.ProcessGroup
) -> Tensor | Ragged:
    """What this rank asked for of `part`, the first's rows first; `lens`, `wanted` (ranks, B)."""
    if isinstance(part, Tensor):
        return exchange_rows(part[route.rows], route.sent, route.received, group)
    rank, device = dist.get_rank(group), part.values.device
    asked, size = lens.flatten()[wanted], lens.shape[1]  # (ranks, B): tokens of what each wants
    owners = wanted // size
    sent = (asked * (owners == rank)).sum(1).tolist()
    received = torch.zeros(len(lens), dtype=torch.int64)
    received = received.index_add(0, owners[rank], asked[rank]).tolist()
    tokens, _ = part.token_ids_of(route.rows, sum(sent))
    values = exchange_rows(part.values[tokens], sent, received, group)
    arrived = asked[rank][owners[rank].argsort(stable=True)]
    cu_seqlens = torch.nn.functional.pad(arrived.cumsum(0), (1, 0)).to(device, torch.int32)
    return Ragged(values, cu_seqlens, int(arrived.max()))
