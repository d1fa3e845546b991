"""Rows of every rank, with uneven counts. What the ops say about ranks is built on these functions
and on vlpfast/ops/_contrastive_dist.py; nothing else in vlpfast/ops communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from vlpfast.ops._once import once_differentiable

# What has second-order gradients over ranks: nothing.
_INSTEAD = 'one process with impl="reference" has them'


def gather_counts(count: int, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """`count` of every rank, in rank order. The host waits for the answer."""
    return [counts for (counts,) in gather_sizes((count,), group, device)]


def gather_sizes(
    sizes: Sequence[int], group: dist.ProcessGroup, device: torch.device
) -> list[list[int]]:
    """`sizes` (as many on every rank) of every rank, in rank order. The host waits."""
    mine = torch.tensor([sizes], dtype=torch.int64, device=device)
    every = torch.zeros(dist.get_world_size(group), len(sizes), dtype=torch.int64, device=device)
    dist.all_gather(list(every.split(1)), mine, group=group)
    return every.tolist()


def gather_rows(rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Concatenates the rows of every rank, in rank order.

    The backward sums over ranks what each of them sends back to a row (a reduce-scatter), so that
    every rank receives d(sum of all ranks' losses)/d(its rows).

    Args:
        rows (B, ...): rows of this rank.
        counts: rows of every rank, from `gather_counts`.
        group: the ranks.

    Returns:
        (sum(counts), ...).
    """
    return _GatherRows.apply(rows, tuple(counts), group)


def exchange_rows(
    rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Rows of this rank to others, and theirs to this one; gradients go the same ways back.

    Args:
        rows (sum(sent), ...): those for the first rank, then those for the second, and so on.
        sent, received: how many go to each rank, and how many each one has for this.
        group: the ranks, all of which make this call.

    Returns:
        (sum(received), ...), those of the first rank first.
    """
    return _ExchangeRows.apply(rows, list(sent), list(received), group)


def start_gather(
    rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup
) -> Callable[[], Tensor]:
    """Starts `gather_rows` without gradient; call the result to wait for it."""
    most = max(counts)
    mine = pad_rows(rows.detach(), most)
    gathered = torch.empty((len(counts), *mine.shape), dtype=mine.dtype, device=mine.device)
    work = dist.all_gather(list(gathered.unbind(0)), mine, group=group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        if all(count == most for count in counts):
            return gathered.flatten(0, 1)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    return finish


def pad_rows(rows: Tensor, count: int) -> Tensor:
    """Zero rows appended up to `count`, contiguous: gloo gathers equal shapes only."""
    if rows.shape[0] == count:
        return rows.contiguous()
    padded = rows.new_zeros(count, *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    return padded


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _swap(rows, sent, received, group)

    @staticmethod
    @once_differentiable("exchange_rows", _INSTEAD)
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _swap(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _swap(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, counts: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return start_gather(rows, counts, group)()

    @staticmethod
    @once_differentiable("gather_rows", _INSTEAD)
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = [pad_rows(part, max(ctx.counts)) for part in grad.split(ctx.counts)]
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, parts, group=ctx.group)
        return mine[: ctx.counts[dist.get_rank(ctx.group)]], None, None
