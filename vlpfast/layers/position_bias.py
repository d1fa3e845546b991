"""Relative position bias: a learned number for each head and each kind of displacement."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def window_displacements(side: int) -> tuple[Tensor, int]:
    """Kinds of displacement between a class token followed by the patches of a square, (N, N) int64
    with N = 1 + side * side, and how many kinds there are.

    Query m and key n of the square have kind (dy + side - 1) * (2 side - 1) + dx + side - 1, where
    (dy, dx) is where m lies from n; class token to patch, patch to class token and class token to
    itself are the last three.

    Source: Bao et al. 2021 (BEiT), arXiv:2106.08254; microsoft/unilm beit2/modeling_finetune.py
    `RelativePositionBias`.
    """
    kinds = (2 * side - 1) ** 2
    place = torch.arange(side * side)
    y, x = place // side, place % side
    dy, dx = y[:, None] - y + side - 1, x[:, None] - x + side - 1
    patches = dy * (2 * side - 1) + dx
    index = F.pad(patches, (1, 0, 1, 0))
    index[0, :], index[:, 0], index[0, 0] = kinds, kinds + 1, kinds + 2
    return index, kinds + 3


class RelativeBias(nn.Module):
    """bias[l, h, m, n] = table[l * num_kinds + kind[m, n], h] for `ops.attention`, from zeros.

    Args:
        heads: attention heads.
        index (M, N): int64 kind of each pair of a query and a key.
        num_kinds: rows of a layer's table, index < num_kinds.
        layers: layers with a bias of their own; 1 where all layers share it.
    """

    def __init__(self, heads: int, index: Tensor, num_kinds: int, layers: int = 1) -> None:
        super().__init__()
        self.layers = layers
        self.table = nn.Parameter(torch.zeros(layers * num_kinds, heads))
        self.register_buffer("index", index, persistent=False)

    def forward(self) -> Tensor:
        """(layers, H, M, N), all by one lookup: its gradient is summed in a fixed order."""
        rows = self.table.unflatten(0, (self.layers, -1)).transpose(0, 1).flatten(1)
        bias = F.embedding(self.index, rows).movedim(2, 0)
        return bias.unflatten(0, (self.layers, -1)).contiguous()
