"""What the chunked contrastive loss is given, keeps and returns.

Letters: C candidates of a direction, k hard negatives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlpfast.ops._contrastive_tiles import Sweep


class Problem(NamedTuple):
    """Arguments of `ops.contrastive_loss`, checked; features in one dtype, scalars fp32 and 0-d."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor
    ids: Tensor | None
    image_keys: Tensor | None
    text_keys: Tensor | None
    key_ids: Tensor | None
    image_teacher: Tensor | None
    text_teacher: Tensor | None
    seed: Tensor | None
    kind: str
    label_smoothing: float
    alpha: float
    hard_negatives: int


class Wants(NamedTuple):
    """Which gradients are made."""

    image: bool
    text: bool
    scalars: bool


class Result(NamedTuple):
    """Loss (), its directions, statistics as in `ContrastiveOutput`, and gradients of the loss:
    of image and text in their dtype, of scale and bias in fp32; empty where not wanted.
    """

    loss: Tensor
    image_to_text: Tensor
    text_to_image: Tensor
    image_lse: Tensor
    text_lse: Tensor
    hard_text: Tensor
    hard_image: Tensor
    image_grad: Tensor
    text_grad: Tensor
    scale_grad: Tensor
    bias_grad: Tensor


class Sums(NamedTuple):
    """Running sums over the candidates of each of n rows (or columns), fp32.

    Attributes:
        max (n,): of z; exp (n,): of exp(z - max); positive (n,): of positives' similarities; total
            (n,): of all similarities, for label smoothing.
        teacher_max (n,), teacher_exp (n,): the teacher's; teacher_dot (n,): of its exp(z - max)
            times the student's similarity.
        loss (n,): sigmoid losses.
    """

    max: Tensor
    exp: Tensor
    positive: Tensor
    total: Tensor
    teacher_max: Tensor
    teacher_exp: Tensor
    teacher_dot: Tensor
    loss: Tensor

    @classmethod
    def start(cls, size: int, like: Tensor) -> Sums:
        sums = like.new_zeros(8, size, dtype=torch.float32)
        sums[0] = sums[4] = -torch.inf
        return cls(*sums.unbind(0))

    def of(self, rows: slice) -> Sums:
        return Sums(*(x[rows] for x in self))

    def lse(self) -> Tensor:
        return self.max + self.exp.log()


class Direction(NamedTuple):
    """One direction of the loss for this rank's rows.

    Attributes:
        sweep: the tiles; sums: of its rows.
        weight (B,): of each positive in the targets.
        num_candidates: C.
        grad (B, D): fp32, where sum_j g_ij c_j is added, or None.
        dot (B,), bias_dot (B,): sums of g times s, and of g.
        best (B, k), drawn (B, k): scores and rows of its hard negatives.
    """

    sweep: Sweep
    sums: Sums
    weight: Tensor
    num_candidates: int
    grad: Tensor | None
    dot: Tensor
    bias_dot: Tensor
    best: Tensor
    drawn: Tensor


def count_equal(ids: Tensor, batch_ids: Tensor, key_ids: Tensor | None) -> Tensor:
    """How many of `batch_ids` and `key_ids` equal each of `ids`, all of which are in `batch_ids`.
    No host sync.
    """
    ordered = batch_ids.sort().values
    first = torch.searchsorted(ordered, ids)
    counts = torch.searchsorted(ordered, ids, right=True) - first
    if key_ids is None:
        return counts
    place = torch.searchsorted(ordered, key_ids).clamp(max=max(0, ordered.shape[0] - 1))
    found = torch.zeros_like(ordered)
    if ordered.shape[0] > 0:
        found.index_add_(0, place, (ordered[place] == key_ids).to(ordered.dtype))
    return counts + found[first]
