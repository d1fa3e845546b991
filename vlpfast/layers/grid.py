"""A CNN whose last feature map is the image's tokens (Pixel-BERT)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.layers.cnn import backbone


class GridEmbedding(nn.Module):
    """uint8 images -> a token for each (kept) cell of a CNN's feature map, max-pooled to the size
    `patch_size`, plus a vector that all share. What a cell's place is, the CNN's borders tell it;
    where cells can be hidden, each place has a learned vector too.

    Args:
        hideable: of how many cells a mask token may stand for some; 0: none can be hidden.

    Source: Huang et al. 2020 (Pixel-BERT), section 3.2, arXiv:2004.00849.
    """

    def __init__(
        self,
        dim: int,
        kind: str,
        *,
        patch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        hideable: int = 0,
    ) -> None:
        super().__init__()
        self.cnn = backbone(kind, grid=True)
        self.pool, rest = divmod(patch_size, self.cnn.stride)
        if rest or not self.pool:
            raise ValueError(
                f"vision.patch_size must be a multiple of the CNN's stride {self.cnn.stride}, "
                f"got {patch_size}"
            )
        self.cell = nn.Linear(self.cnn.out_dim, dim)
        self.kind = nn.Parameter(torch.empty(dim))
        self.position = nn.Parameter(torch.empty(hideable, dim)) if hideable else None
        self.mask_token = nn.Parameter(torch.zeros(dim)) if hideable else None
        self.patch_size, self.mean, self.std = patch_size, mean, std

    def forward(
        self, images: Tensor, keep_ids: Tensor | None = None, hidden: Tensor | None = None
    ) -> Tensor:
        """images (B, H, W, 3) uint8, keep_ids (B, K) int64 or None -> (B, K, dim). Where `hidden`
        (B, P) bool is True, the mask token stands for the cell, and the CNN sees the mean colour
        there: its cells see their neighbours' pixels.
        """
        dtype = self.cell.weight.dtype
        mean, std = (
            torch.tensor(v, dtype=dtype, device=images.device) for v in (self.mean, self.std)
        )
        pixels = ((images.to(dtype) / 255 - mean) / std).permute(0, 3, 1, 2)
        if hidden is not None:
            side = images.shape[1] // self.patch_size
            seen = ~hidden.view(-1, 1, side, side)
            seen = seen.repeat_interleave(self.patch_size, 2).repeat_interleave(self.patch_size, 3)
            pixels = pixels * seen
        cells = self.cnn(pixels)
        if self.pool > 1:
            cells = F.max_pool2d(cells, self.pool)
        cells = cells.flatten(2).mT  # (B, P, out_dim)
        if keep_ids is not None:
            cells = cells.gather(1, keep_ids[:, :, None].expand(-1, -1, cells.shape[2]))
        tokens = self.cell(cells)
        if hidden is not None:
            tokens = torch.where(hidden[..., None], self.mask_token.to(tokens.dtype), tokens)
        if self.position is not None:
            tokens = tokens + (self.position if keep_ids is None else self.position[keep_ids])
        return tokens + self.kind
