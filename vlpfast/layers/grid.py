"""A CNN whose last feature map is the image's tokens (Pixel-BERT)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Group statistics are an image's own: gradients do not depend on how a batch is split.
_GROUPS = 8


class _Residual(nn.Module):
    """relu(shortcut(x) + branch(x)); `bottleneck` is ResNet-50's 1x1, 3x3, 1x1, else 3x3, 3x3."""

    def __init__(self, width: int, out: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        inner = out // 4 if bottleneck else out
        shapes = (
            ((width, inner, 1, 1), (inner, inner, 3, stride), (inner, out, 1, 1))
            if bottleneck
            else ((width, inner, 3, stride), (inner, out, 3, 1))
        )
        self.branch = nn.Sequential()
        for place, shape in enumerate(shapes):
            self.branch.extend([nn.ReLU()] if place else [])
            self.branch.extend(_conv_norm(*shape))
        changes = stride > 1 or width != out
        self.shortcut = nn.Sequential(*_conv_norm(width, out, 1, stride)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + (x if self.shortcut is None else self.shortcut(x)))


def _conv_norm(width: int, out: int, kernel: int, stride: int) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(width, out, kernel, stride, kernel // 2, bias=False)
    return conv, nn.GroupNorm(_GROUPS, out)


class ResNet(nn.Module):
    """(B, 3, S, S) -> (B, out_dim, S / stride, S / stride).

    "resnet50" is the published network with group normalisation in place of batch normalisation,
    stride 32; "small" has two 3x3 blocks at each of strides 2, 4 and 8.

    Source: He et al. 2015, table 1, arXiv:1512.03385.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        deep = kind == "resnet50"
        widths, depths = (
            ((256, 512, 1024, 2048), (3, 4, 6, 3)) if deep else ((32, 64, 128), (2, 2, 2))
        )
        stem = (3, 64, 7, 2) if deep else (3, 16, 3, 1)
        layers = [*_conv_norm(*stem), nn.ReLU(), *([nn.MaxPool2d(3, 2, 1)] if deep else [])]
        self.stride, width = (4 if deep else 1), stem[1]
        for stage, (out, depth) in enumerate(zip(widths, depths, strict=True)):
            for place in range(depth):
                # ResNet-50's first stage follows a pooling and keeps the size.
                stride = 2 if place == 0 and (stage or not deep) else 1
                layers.append(_Residual(width, out, stride, deep))
                self.stride, width = self.stride * stride, out
        self.out_dim, self.layers = width, nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


class GridEmbedding(nn.Module):
    """uint8 images -> a token for each (kept) cell of a CNN's feature map, max-pooled to the size
    `patch_size`, plus a vector that all share. What a cell's place is, the CNN's borders tell it.

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
    ) -> None:
        super().__init__()
        self.cnn = ResNet(kind)
        self.pool, rest = divmod(patch_size, self.cnn.stride)
        if rest or not self.pool:
            raise ValueError(
                f"vision.patch_size must be a multiple of the CNN's stride {self.cnn.stride}, "
                f"got {patch_size}"
            )
        self.cell = nn.Linear(self.cnn.out_dim, dim)
        self.kind = nn.Parameter(torch.empty(dim))
        self.mean, self.std = mean, std

    def forward(self, images: Tensor, keep_ids: Tensor | None = None) -> Tensor:
        """images (B, H, W, 3) uint8, keep_ids (B, K) int64 or None -> (B, K, dim)."""
        dtype = self.cell.weight.dtype
        mean, std = (
            torch.tensor(v, dtype=dtype, device=images.device) for v in (self.mean, self.std)
        )
        pixels = ((images.to(dtype) / 255 - mean) / std).permute(0, 3, 1, 2)
        cells = self.cnn(pixels)
        if self.pool > 1:
            cells = F.max_pool2d(cells, self.pool)
        cells = cells.flatten(2).mT  # (B, P, out_dim)
        if keep_ids is not None:
            cells = cells.gather(1, keep_ids[:, :, None].expand(-1, -1, cells.shape[2]))
        return self.cell(cells) + self.kind
