"""Crops, flips and colour changes.

Every number is a function of (seed, place in the stream): no generator is read.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops.reference.counter import draw, stream, uniform

_CROP_ATTEMPTS = 10
# First counter of each use, so that all numbers of a draw are distinct; masking starts at 0x10 <<
# 24.
CAPTION, FLIP, CROP, JITTER, GRAYSCALE, REDRAW, ZOOM, CLASS, TASK = (
    purpose << 24 for purpose in range(0x20, 0x29)
)
# ITU-R BT.601 luma, as Pillow's "L".
_LUMA = (0.299, 0.587, 0.114)


def uniforms(seed: int, positions: Tensor, first: int, count: int) -> Tensor:
    """(B, count) float32 in [0, 1): from counter `first` of the streams of `positions`."""
    counters = torch.arange(first, first + count, device=positions.device)
    return uniform(draw(stream(seed, positions)[:, None], counters))


def integers(seed: int, positions: Tensor, counter: int, bounds: Tensor | int) -> Tensor:
    """(B,) int64, uniform in 0..bounds-1, for bounds up to 2**47, in steps of bounds / 2**32."""
    bits = draw(stream(seed, positions), torch.tensor(counter, device=positions.device))
    bounds = torch.as_tensor(bounds, device=positions.device)
    # bits * bounds / 2**32 in two halves, so that the product stays within int64.
    high, low = bits >> 16, bits & 0xFFFF
    return (high * bounds + ((low * bounds) >> 16)) >> 16


def crop_boxes(
    widths: np.ndarray,
    heights: np.ndarray,
    positions: np.ndarray,
    *,
    seed: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Random resized crops: area uniform in `scale`, ratio log-uniform in `ratio`, place uniform.

    Of ten drawn boxes the first that fits is taken; if none fits, the largest centred box whose
    aspect ratio is within `ratio` (torchvision's RandomResizedCrop).

    Args:
        widths, heights, positions (B,): image sizes and places in the stream.

    Returns: (B, 4) int64 x, y, width, height.
    """
    numbers = uniforms(seed, torch.from_numpy(positions), CROP, 4 * _CROP_ATTEMPTS).double().numpy()
    u_area, u_ratio, u_x, u_y = numbers.reshape(len(positions), 4, _CROP_ATTEMPTS).transpose(
        1, 0, 2
    )
    W, H = widths[:, None].astype(np.float64), heights[:, None].astype(np.float64)
    area = W * H * (scale[0] + u_area * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + u_ratio * (high - low))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w >= 1) & (h >= 1) & (w <= W) & (h <= H)
    boxes = np.stack([np.floor(u_x * (W - w + 1)), np.floor(u_y * (H - h + 1)), w, h], -1)
    chosen = boxes[np.arange(len(boxes)), fits.argmax(1)]

    w = np.minimum(W[:, 0], np.rint(H[:, 0] * ratio[1])).clip(1)
    h = np.minimum(H[:, 0], np.rint(W[:, 0] / ratio[0])).clip(1)
    centred = np.stack([(W[:, 0] - w) // 2, (H[:, 0] - h) // 2, w, h], -1)
    return np.where(fits.any(1)[:, None], chosen, centred).astype(np.int64)


def eval_boxes(widths: np.ndarray, heights: np.ndarray, crop: str) -> np.ndarray:
    """(B, 4) int64 x, y, width, height: centred square ("center") or whole image ("squash")."""
    widths, heights = widths.astype(np.int64), heights.astype(np.int64)
    if crop == "squash":
        return np.stack([np.zeros_like(widths), np.zeros_like(heights), widths, heights], -1)
    side = np.minimum(widths, heights)
    return np.stack([(widths - side) // 2, (heights - side) // 2, side, side], -1)


def shown_parts(boxes: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Crops (B, 4), as `crop_boxes` has them, -> (B, 4) float64 x1, y1, x2, y2, fractions of their
    images' widths and heights (B,).
    """
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    return corners / np.stack([widths, heights] * 2, 1)


def aspect_sizes(
    widths: np.ndarray, heights: np.ndarray, *, shorter: int, max_aspect: float, multiple: int
) -> np.ndarray:
    """(B, 2) int64 height and width that images are resized to: the shorter side `shorter`, both
    less where the longer would be above `max_aspect` times that, then down to multiples.

    Source: dandelin/ViLT vilt/transforms/utils.py `MinMaxResize`.
    """
    sides = np.stack([heights, widths], 1).astype(np.float64)
    sides *= shorter / sides.min(1, keepdims=True)
    sides *= np.minimum(1.0, int(max_aspect * shorter) / sides.max(1, keepdims=True))
    rounded = np.floor(sides + 0.5).astype(np.int64) // multiple * multiple
    return np.maximum(rounded, multiple)


def hflip(images: Tensor, *, seed: int, positions: Tensor, probability: float) -> Tensor:
    """Mirrors each image (B, H, W, 3) with `probability`."""
    flipped = uniforms(seed, positions, FLIP, 1)[:, 0] < probability
    return torch.where(flipped[:, None, None, None], images.flip(2), images)


def zoom_out(images: Tensor, *, seed: int, positions: Tensor, factor: float) -> Tensor:
    """Shrinks uint8 images (B, H, W, 3) by 1..`factor`, log-uniform, each at a uniform place on
    white; bilinear.

    Source: Liu et al. 2016 (SSD), arXiv:1512.02325, section 3.6 ("zoom out").
    """
    u_zoom, u_x, u_y = uniforms(seed, positions, ZOOM, 3).unbind(1)
    zoom = factor**u_zoom
    # A pixel of the result at p in [-1, 1] reads the image at zoom * p + shift.
    matrix = images.new_zeros(len(images), 2, 3, dtype=torch.float32)
    matrix[:, 0, 0] = matrix[:, 1, 1] = zoom
    matrix[:, 0, 2], matrix[:, 1, 2] = (zoom - 1) * (2 * u_x - 1), (zoom - 1) * (2 * u_y - 1)
    # White is zero here: grid_sample pads with it.
    ink = (255 - images).permute(0, 3, 1, 2).float()
    grid = F.affine_grid(matrix, list(ink.shape), align_corners=False)
    ink = F.grid_sample(ink, grid, align_corners=False)
    return 255 - ink.permute(0, 2, 3, 1).round().to(torch.uint8)


def color_jitter(images: Tensor, *, seed: int, positions: Tensor, strength: float) -> Tensor:
    """Brightness, contrast, saturation of uint8 images (B, H, W, 3), factors in 1 -+ strength.

    brightness: x * f; contrast: m + (x - m) * f, m the image's mean luma; saturation: l + (x - l) *
    f, l the luma.
    """
    factors = 1 + strength * (2 * uniforms(seed, positions, JITTER, 3) - 1)
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    x = (images.float() * brightness).clamp(0, 255)
    mean = _luma(x).mean((1, 2, 3), keepdim=True)
    x = (mean + (x - mean) * contrast).clamp(0, 255)
    luma = _luma(x)
    x = luma + (x - luma) * saturation
    return x.round().clamp(0, 255).to(torch.uint8)


def grayscale(images: Tensor, *, seed: int, positions: Tensor, probability: float) -> Tensor:
    """Replaces each uint8 image (B, H, W, 3) by its luma with `probability`."""
    gray = uniforms(seed, positions, GRAYSCALE, 1)[:, 0] < probability
    luma = _luma(images.float()).round().to(torch.uint8).expand_as(images)
    return torch.where(gray[:, None, None, None], luma, images)


def _luma(x: Tensor) -> Tensor:
    return (x * torch.tensor(_LUMA, device=x.device)).sum(-1, keepdim=True)
