"""What the model's parts return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlpfast.ragged import Ragged


@dataclass(frozen=True)
class ImageOutput:
    """tokens (B, N, D): class token first; of regions packed (T, D); may be None where they were
    not wanted. embedding (B, E): L2-normalised, in the joint space; None where the model has none.
    class_head (B, N, D): of masked images, what the class token's head makes of them; None where
    the model has none. joint_embedding: as `embedding`, of the layers with experts for both
    modalities (VLMo).
    """

    tokens: Tensor | Ragged | None
    embedding: Tensor | None
    class_head: Tensor | None = None
    joint_embedding: Tensor | None = None


@dataclass(frozen=True)
class TextOutput:
    """tokens: packed (T, D), or None, and embeddings as in `ImageOutput`."""

    tokens: Ragged | None
    embedding: Tensor | None
    joint_embedding: Tensor | None = None


@dataclass(frozen=True)
class FusedOutput:
    """R (text, image) rows after fusion.

    text: packed text tokens (T, D); image: packed image tokens of the same rows, None where fusion
    leaves the images as they are ("cross").
    """

    text: Ragged
    image: Ragged | None
