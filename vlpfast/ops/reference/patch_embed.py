"""Patch embedding spelled out: normalise, convolve, add positions, then keep the chosen patches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import conv2d


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    ids: Tensor | None,
    *,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    layout: str,
) -> Tensor:
    """`vlpfast.ops.patch_embed`, same arguments."""
    pixels = images.permute(0, 3, 1, 2) if layout == "hwc" else images
    mean, std = (weight.new_tensor(values)[:, None, None] for values in (mean, std))
    normalised = (pixels.to(weight.dtype) / 255 - mean) / std
    tokens = conv2d(normalised, weight, bias, stride=patch_size).flatten(2).transpose(1, 2)
    tokens = tokens if pos_embed is None else tokens + pos_embed
    if ids is None:
        return tokens
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))
