"""Momentum teacher and feature queue (MoCo, ALBEF): soft targets and further contrastive
candidates.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vlpfast.models.vlp import VLPModel


class Teacher(nn.Module):
    """An exponential moving average of a model, never differentiated.

    Source: Li et al. 2021 (ALBEF), arXiv:2107.07651, section 3.3; He et al. 2020 (MoCo),
    arXiv:1911.05722.
    """

    def __init__(self, model: VLPModel, momentum: float) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.momentum = momentum

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode: the teacher uses no dropout."""
        return super().train(False)

    @torch.no_grad()
    def update(self, model: VLPModel) -> None:
        """teacher = momentum * teacher + (1 - momentum) * model, all parameters at once; buffers
        (a BatchNorm's statistics are averages already) become the model's.
        """
        torch._foreach_lerp_(
            list(self.model.parameters()), list(model.parameters()), 1 - self.momentum
        )
        for own, other in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(other)


class FeatureQueue(nn.Module):
    """Ring buffer of the last `size` momentum embeddings and their image ids; any batch size, also
    one that wraps.

    Only filled entries are handed out, so the queue's random start never acts as negatives.
    """

    def __init__(self, size: int, embed_dim: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("image", torch.zeros(size, embed_dim))
        self.register_buffer("text", torch.zeros(size, embed_dim))
        self.register_buffer("ids", torch.full((size,), -1, dtype=torch.int64))
        # Host-side on purpose: how much is filled decides shapes.
        self.pushed = 0

    def get_extra_state(self) -> int:
        """Number of embeddings pushed since the start."""
        return self.pushed

    def set_extra_state(self, state: int) -> None:
        """Restores `get_extra_state`."""
        self.pushed = int(state)

    @property
    def filled(self) -> int:
        """Entries in use."""
        return min(self.pushed, self.size)

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Image (n, E) and text (n, E) embeddings and image ids (n,) of the filled part, as views
        valid until `push`.
        """
        return tuple(t[: self.filled] for t in (self.image, self.text, self.ids))

    @torch.no_grad()
    def push(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """Overwrites the oldest entries by image (B, E), text (B, E), ids (B,); of more than `size`
        rows the last stay.
        """
        count = image.shape[0]
        start = self.pushed + max(count - self.size, 0)
        slots = torch.arange(start, self.pushed + count, device=self.ids.device) % self.size
        for buffer, rows in ((self.image, image), (self.text, text), (self.ids, ids)):
            buffer[slots] = rows[-self.size :].to(buffer.dtype)
        self.pushed += count
