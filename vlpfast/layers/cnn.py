"""Convolutional networks: pixels to feature maps."""

from __future__ import annotations

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

    def init_weights(self) -> None:
        """He initialisation."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()


class TimmBackbone(nn.Module):
    """A network of timm by its name, initialised by timm: (B, 3, S, S) -> its last feature map
    (B, out_dim, h, w), or the vector that its classifier reads, (B, out_dim, 1, 1).

    Raises:
        NotImplementedError: timm cannot be imported.
        ValueError: timm has no such network.
    """

    def __init__(self, name: str, *, grid: bool) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise NotImplementedError(
                f"vision.cnn={name!r} needs timm and the torchvision it imports ({error}); "
                "'small' and 'resnet50' need neither"
            ) from error
        if not timm.is_model(name):
            raise ValueError(
                f"vision.cnn must be 'small', 'resnet50' or a model of timm, got {name!r}"
            )
        self.grid = grid
        if grid:
            self.network = timm.create_model(name, features_only=True, out_indices=(-1,))
            self.out_dim = self.network.feature_info.channels()[-1]
            self.stride = self.network.feature_info.reduction()[-1]
        else:
            self.network = timm.create_model(name, num_classes=0)
            # VGG's classifier reads a hidden layer of its own.
            self.out_dim = getattr(self.network, "head_hidden_size", self.network.num_features)

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.network(pixels)
        return out[-1] if self.grid else out[:, :, None, None]


def backbone(name: str, *, grid: bool) -> ResNet | TimmBackbone:
    """The network `name` of `VisionConfig.cnn`; `grid` asks for its last feature map."""
    if name in ("small", "resnet50"):
        return ResNet(name)
    return TimmBackbone(name, grid=grid)
