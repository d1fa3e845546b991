"""Images: pixels of B images of unlike sizes, side by side in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """B images, each in the top left corner of its place.

    Attributes:
        pixels (B, H, W, 3): uint8; what is beyond an image's own rows and columns is never read.
        sizes (B, 2): int64 height and width of each, pixels, on the host: they decide shapes.
    """

    pixels: Tensor
    sizes: Tensor

    def __post_init__(self) -> None:
        size = self.pixels.shape[0]
        if self.pixels.dim() != 4 or self.pixels.shape[3] != 3:
            raise ValueError(f"images must be (B, H, W, 3), got {tuple(self.pixels.shape)}")
        if self.sizes.shape != (size, 2) or self.sizes.device.type != "cpu":
            got = f"{tuple(self.sizes.shape)} on {self.sizes.device}"
            raise ValueError(f"images' sizes must be ({size}, 2) on cpu, got {got}")
        most = torch.tensor(self.pixels.shape[1:3])
        if size and (bool((self.sizes > most).any()) or bool((self.sizes < 1).any())):
            raise ValueError(
                f"images' sizes must be in 1 .. {tuple(most.tolist())}, got "
                f"{self.sizes.amin(0).tolist()} to {self.sizes.amax(0).tolist()}"
            )

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def __getitem__(self, rows: Tensor | Sequence[int]) -> Images:
        """Images `rows` (R,) int64, in that order."""
        rows = torch.as_tensor(rows)
        return Images(self.pixels[rows.to(self.pixels.device)], self.sizes[rows.cpu()])

    def to(self, *args, **kwargs) -> Images:
        """`Tensor.to` for the pixels."""
        return Images(self.pixels.to(*args, **kwargs), self.sizes)

    def patches(self, patch_size: int) -> Tensor:
        """(B, 2) int64 rows and columns of patches, on the host.

        Raises:
            ValueError: a side is no multiple of `patch_size`.
        """
        if bool((self.sizes % patch_size).any()):
            raise ValueError(
                f"images' sides must be multiples of the patches' {patch_size}, got "
                f"{self.sizes[(self.sizes % patch_size).any(1)][0].tolist()}"
            )
        return self.sizes // patch_size
