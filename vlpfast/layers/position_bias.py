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


def pair_displacements(side: int, length: int) -> tuple[Tensor, int]:
    """Kinds of displacement within an image, a class token and a square of patches, followed by a
    text of `length` tokens: (N, N) int64 with N = 1 + side * side + length, and how many there are.

    First the image's (`window_displacements`), then text to image and image to text, then how far
    text key n lies behind query m, n - m from 2 - length to length - 2, then the start token to
    others, others to it, and it to itself.

    Source: Bao et al. 2022 (VLMo), arXiv:2111.02358; microsoft/unilm vlmo/modules/vlmo_module.py
    `build_relative_position_embed`, where text is first.
    """
    image, kinds = window_displacements(side)
    place = torch.arange(length - 1)
    first = kinds + 2
    text = F.pad(place - place[:, None] + first + length - 2, (1, 0, 1, 0))
    last = first + 2 * length - 3
    text[0, :], text[:, 0], text[0, 0] = last, last + 1, last + 2
    from_image = image.new_full((len(image), length), kinds + 1)
    from_text = image.new_full((length, len(image)), kinds)
    index = torch.cat([torch.cat([image, from_image], 1), torch.cat([from_text, text], 1)])
    return index, last + 3


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

    def forward(self, part: slice = slice(None)) -> Tensor:
        """(layers, H, M, N), all by one lookup: its gradient is summed in a fixed order. `part` is
        the places among which it is wanted.
        """
        rows = self.table.unflatten(0, (self.layers, -1)).transpose(0, 1).flatten(1)
        bias = F.embedding(self.index[part, part], rows).movedim(2, 0)
        return bias.unflatten(0, (self.layers, -1)).contiguous()
