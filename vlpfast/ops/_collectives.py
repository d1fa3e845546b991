"""Rows of every rank, with gradient and with uneven counts. What the ops say about ranks is built
on these two functions; nothing else in vlpfast/ops communicates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def gather_counts(count: int, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """`count` of every rank, in rank order. The host waits for the answer."""
    mine = torch.tensor([count], dtype=torch.int64, device=device)
    counts = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
    dist.all_gather(list(counts.split(1)), mine, group=group)
    return counts.tolist()


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


def _pad_rows(rows: Tensor, count: int) -> Tensor:
    """Zero rows appended up to `count`: gloo gathers equal shapes only."""
    padded = rows.new_zeros(count, *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    return padded


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, counts: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        mine = _pad_rows(rows, max(counts))
        gathered = [torch.empty_like(mine) for _ in counts]
        dist.all_gather(gathered, mine, group=group)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = [_pad_rows(part, max(ctx.counts)) for part in grad.split(ctx.counts)]
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, parts, group=ctx.group)
        return mine[: ctx.counts[dist.get_rank(ctx.group)]], None, None
