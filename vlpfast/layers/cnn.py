"""Convolutional networks as image front ends: feature maps as tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class _Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut.

    Groups of eight channels are normalised, so that an image's features depend neither on the
    other images of its batch nor on how a batch is split over ranks.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(outputs // 8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(outputs // 8, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rest = x if self.shortcut is None else self.shortcut(x)
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(rest + self.norm2(self.conv2(x)))


class ResNet(nn.Module):
    """Pixels (B, 3, S, S) -> tokens (B, (S / 16)^2, dim): four stages of `depth` blocks, each of
    twice the width of the one before.

    Source: He et al. 2016, arXiv:1512.03385, with a 3 x 3 stem and GroupNorm (Wu & He 2018,
        arXiv:1803.08494) for BatchNorm.
    """

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        if dim % 64:
            raise ValueError(f"vision.dim of cnn 'resnet' must be a multiple of 64, got {dim}")
        self.stem = nn.Conv2d(3, dim // 8, 3, stride=2, padding=1)
        widths = [dim // 8, dim // 8, dim // 4, dim // 2, dim]
        self.blocks = nn.Sequential(
            *(
                _Residual(
                    widths[stage] if first else widths[stage + 1],
                    widths[stage + 1],
                    stride=2 if first and stage else 1,
                )
                for stage in range(4)
                for first in [True] + [False] * (depth - 1)
            )
        )
        self.init_weights()

    def init_weights(self) -> None:
        """He initialisation; each block starts as its shortcut."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()
        nn.init.zeros_(self.stem.bias)
        for block in self.blocks:
            nn.init.zeros_(block.norm2.weight)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.blocks(F.relu(self.stem(pixels))).flatten(2).mT


class TimmBackbone(nn.Module):
    """A network of timm by its name: pixels (B, 3, S, S) -> tokens (B, N, dim), freshly
    initialised by timm.

    Args:
        grid: the last feature map, N its places; else the vector that its classifier reads, N = 1.

    Raises:
        NotImplementedError: timm cannot be imported.
        ValueError: timm has no such network, or its width is not `dim`.
    """

    def __init__(self, name: str, dim: int, *, grid: bool) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise NotImplementedError(
                f"vision.cnn={name!r} needs timm and the torchvision it imports ({error}); "
                "'resnet' needs neither"
            ) from error
        if not timm.is_model(name):
            raise ValueError(f"vision.cnn must be 'resnet' or a model of timm, got {name!r}")
        self.grid = grid
        if grid:
            self.network = timm.create_model(name, features_only=True, out_indices=(-1,))
            width = self.network.feature_info.channels()[-1]
        else:
            self.network = timm.create_model(name, num_classes=0)
            # VGG's classifier reads a hidden layer of its own.
            width = getattr(self.network, "head_hidden_size", self.network.num_features)
        if width != dim:
            raise ValueError(f"vision.dim must be {width} for vision.cnn={name!r}, got {dim}")

    def forward(self, pixels: Tensor) -> Tensor:
        if not self.grid:
            return self.network(pixels)[:, None]
        return self.network(pixels)[-1].flatten(2).mT
