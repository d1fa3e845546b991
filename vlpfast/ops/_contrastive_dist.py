"""Where the in-batch candidates of a contrastive loss come from: this process, an all-gather that
overlaps the local tile, or a ring when the features of all ranks would not fit.

Letters: N rows of a block of candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from vlpfast.ops._collectives import gather_rows, pad_rows, start_gather
from vlpfast.ops._contrastive_products import zeros

# Gathered features (of all ranks and, if trained, their fp32 gradient) above this go round a ring.
_GATHER_BYTES = 2 << 30


class Block(NamedTuple):
    """Candidates that are similarities' columns together.

    Attributes:
        features (N, D): contiguous.
        first: place of the first one among the batches of all ranks.
        grad (N, D): fp32, where to add the gradient, or None.
    """

    features: Tensor
    first: int
    grad: Tensor | None = None


class Candidates(Protocol):
    """In-batch candidates, block by block.

    Attributes:
        is_repeatable: blocks can be asked for again without further communication.
    """

    is_repeatable: bool

    def blocks(self) -> Iterator[Block]:
        """Every block, this rank's own first."""

    def grad_blocks(self) -> Iterator[Block]:
        """The same; what a caller adds to a block's `grad` before it asks for the next counts."""

    def gradient(self) -> Tensor:
        """(B, D), the sum over ranks of the gradients of this rank's rows, once `grad_blocks` is
        exhausted.
        """


class OneProcess:
    """The batch of this process is all there is."""

    rank, world_size, first_row = 0, 1, 0

    def __init__(self, num_rows: int) -> None:
        self.counts = [num_rows]

    def gather(self, rows: Tensor) -> Tensor:
        return rows

    def merge(self, maximum: Tensor, exp_sum: Tensor, *sums: Tensor) -> None:
        """Merges running sums over ranks, in place: sum of exp(z - maximum), and plain sums."""

    def add(self, total: Tensor) -> None:
        """Sums over ranks, in place."""

    def candidates(self, features: Tensor, trained: bool) -> Candidates:
        return _Local(features, trained)


class _Local:
    """Candidates of this process alone, in one block."""

    is_repeatable = True

    def __init__(self, features: Tensor, trained: bool) -> None:
        grad = zeros(features.shape, features) if trained else None
        self._block = Block(features, 0, grad)

    def blocks(self) -> Iterator[Block]:
        yield self._block

    grad_blocks = blocks

    def gradient(self) -> Tensor:
        return self._block.grad


class Ranks:
    """The batches of the ranks of `group`, whose sizes are `counts`."""

    def __init__(self, counts: list[int], group: dist.ProcessGroup) -> None:
        self.counts, self.group = counts, group
        self.rank, self.world_size = dist.get_rank(group), len(counts)
        self.first_row = sum(counts[: self.rank])

    def gather(self, rows: Tensor) -> Tensor:
        return gather_rows(rows, self.counts, self.group)

    def merge(self, maximum: Tensor, exp_sum: Tensor, *sums: Tensor) -> None:
        mine = maximum.clone()
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=self.group)
        # A rank without rows has seen nothing: its maximum is -inf, its factor 0.
        total = torch.stack([exp_sum * (mine - maximum).exp(), *sums])
        dist.all_reduce(total, group=self.group)
        for into, merged in zip((exp_sum, *sums), total, strict=True):
            into.copy_(merged)

    def add(self, total: Tensor) -> None:
        dist.all_reduce(total, group=self.group)

    def candidates(self, features: Tensor, trained: bool) -> Candidates:
        bytes_each = features.element_size() + (4 if trained else 0)
        if sum(self.counts) * features.shape[1] * bytes_each > _GATHER_BYTES:
            return _Ring(features, self, trained)
        return _Gathered(features, self, trained)


class _Gathered:
    """One all-gather, started at once and awaited after this rank's own block is used."""

    is_repeatable = True

    def __init__(self, features: Tensor, ranks: Ranks, trained: bool) -> None:
        self._ranks, self._mine, self._rest = ranks, features, None
        self._finish = start_gather(features, ranks.counts, ranks.group)
        self._grad = None
        if trained:
            self._grad = zeros((sum(ranks.counts), features.shape[1]), features)

    def _block(self, features: Tensor, first: int) -> Block:
        end = first + features.shape[0]
        return Block(features, first, None if self._grad is None else self._grad[first:end])

    def blocks(self) -> Iterator[Block]:
        first = self._ranks.first_row
        end = first + self._mine.shape[0]
        yield self._block(self._mine, first)
        if self._rest is None:
            gathered = self._finish()
            self._rest = [self._block(gathered[:first], 0), self._block(gathered[end:], end)]
        yield from self._rest

    grad_blocks = blocks

    def gradient(self) -> Tensor:
        counts = self._ranks.counts
        parts = [pad_rows(part, max(counts)) for part in self._grad.split(counts)]
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, parts, group=self._ranks.group)
        return mine[: self._mine.shape[0]]


class _Ring:
    """Blocks travel from rank to rank, each sent on while it is used; gradients travel with them
    and are home after a whole round.
    """

    is_repeatable = False

    def __init__(self, features: Tensor, ranks: Ranks, trained: bool) -> None:
        self._ranks, self._trained = ranks, trained
        self._mine = pad_rows(features, max(ranks.counts))
        self._gradient: Tensor | None = None

    def blocks(self) -> Iterator[Block]:
        current = self._mine
        for owner in self._owners():
            incoming, wait = self._send_on(current, owner)
            yield self._block(current, owner, None)
            wait()
            current = incoming

    def grad_blocks(self) -> Iterator[Block]:
        current = self._mine
        grad = torch.zeros_like(current, dtype=torch.float32) if self._trained else None
        for owner in self._owners():
            incoming, wait = self._send_on(current, owner)
            yield self._block(current, owner, grad)
            wait()
            current = incoming
            if grad is not None:
                # Also after the last block, whose owner is the next rank.
                grad, wait = self._pass_on(grad)
                wait()
        self._gradient = grad

    def gradient(self) -> Tensor:
        return self._gradient[: self._ranks.counts[self._ranks.rank]]

    def _owners(self) -> list[int]:
        W = self._ranks.world_size
        return [(self._ranks.rank - step) % W for step in range(W)]

    def _block(self, padded: Tensor, owner: int, grad: Tensor | None) -> Block:
        counts = self._ranks.counts
        grad = None if grad is None else grad[: counts[owner]]
        return Block(padded[: counts[owner]], sum(counts[:owner]), grad)

    def _send_on(self, current: Tensor, owner: int) -> tuple[Tensor, object]:
        """Starts the exchange with the neighbours, except of the last block, which stays."""
        if owner == (self._ranks.rank + 1) % self._ranks.world_size:
            return current, lambda: None
        return self._pass_on(current)

    def _pass_on(self, tensor: Tensor) -> tuple[Tensor, object]:
        rank, W, group = self._ranks.rank, self._ranks.world_size, self._ranks.group
        if W == 1:
            return tensor, lambda: None
        incoming = torch.empty_like(tensor)
        peers = [dist.get_global_rank(group, (rank + step) % W) for step in (1, -1)]
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, peers[0], group),
                dist.P2POp(dist.irecv, incoming, peers[1], group),
            ]
        )
        return incoming, lambda: [work.wait() for work in works]
