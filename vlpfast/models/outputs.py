"""What the model's parts return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlpfast.ragged import Ragged


@dataclass(frozen=True)
class ImageOutput:
    """tokens (B, N, D): class token first; embedding (B, E): L2-normalised, in the joint space."""

    tokens: Tensor
    embedding: Tensor


@dataclass(frozen=True)
class TextOutput:
    """tokens: packed (T, D); embedding (B, E): L2-normalised, in the joint space."""

    tokens: Ragged
    embedding: Tensor
