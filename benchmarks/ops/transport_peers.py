"""UNITER's recurrence in eager PyTorch, batched and padded, from its definition; lengths of texts
and images for the benchmarks of transport.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import Transport


def masks(shape: Transport, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Valid text tokens and regions: all, or with lengths as captions and detectors have them
    (texts uniform in [T / 4, T], regions in [R / 3, R])."""
    if not shape.varied:
        return None, None
    valid = []
    for seed, longest, shortest in (
        (0, shape.text_len, shape.text_len // 4),
        (1, shape.num_regions, shape.num_regions // 3),
    ):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(shortest, longest + 1, (shape.batch, 1), generator=generator)
        valid.append((torch.arange(longest) < lengths).to(device))
    return valid[0], valid[1]


def num_pairs(shape: Transport) -> int:
    """Valid pairs of a word and a region, over the batch."""
    text, image = masks(shape, torch.device("cpu"))
    if text is None or image is None:
        return shape.batch * shape.text_len * shape.num_regions
    return int((text.sum(1) * image.sum(1)).sum())


@torch.no_grad()
def uniter_plan(
    cost: Tensor, text_pad: Tensor, image_pad: Tensor, beta: float, iters: int
) -> Tensor:
    """Transport plan (B, R, T) of a cost (B, T, R) by batched matrix-vector products; pads are True
    on padding, whose denominators 1e4 keeps away from 0."""
    pad = image_pad[:, :, None] | text_pad[:, None]
    A = (-cost.mT / beta).exp().masked_fill(pad, 0)
    T = torch.ones_like(A).masked_fill(pad, 0)
    num_text = (~text_pad).sum(1).to(cost.dtype)[:, None, None]
    num_image = (~image_pad).sum(1).to(cost.dtype)[:, None, None]
    text_away = text_pad[:, None] * 1e4
    image_away = image_pad[:, :, None] * 1e4
    sigma = (1 / num_text).expand(-1, cost.shape[1], 1)
    for _ in range(iters):
        Q = A * T
        delta = 1 / (num_image * (Q @ sigma) + image_away)
        row = 1 / (num_text * (delta.mT @ Q) + text_away)
        T = delta * Q * row
        sigma = row.mT
    return T.masked_fill(pad, 0)


def uniter_distance(
    text: Tensor, image: Tensor, text_pad: Tensor, image_pad: Tensor, beta: float, iters: int
) -> Tensor:
    """Distances (B,) with gradients through the cost."""
    text, image = text.float(), image.float()
    cost = 1 - F.normalize(text, dim=-1, eps=1e-5) @ F.normalize(image, dim=-1, eps=1e-5).mT
    cost = cost.masked_fill(text_pad[:, :, None] | image_pad[:, None], 0)
    plan = uniter_plan(cost.detach(), text_pad, image_pad, beta, iters)
    return (cost * plan.mT).sum((1, 2))
