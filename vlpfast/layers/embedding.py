"""Front ends: image patches and text tokens to vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlpfast.layers.block import ResidualNorm
from vlpfast.ops.patch_embed import patch_embed
from vlpfast.ragged import Ragged


def sincos_positions(dim: int, side: int) -> Tensor:
    """Fixed 2-D positions (side * side, dim): a quarter each of sin and cos of x and of y.

    Source: Chen et al. 2021 (MoCo v3), arXiv:2104.02057, section 5; facebookresearch/mae
    util/pos_embed.py.
    """
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4 for sincos positions, got {dim}")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    place = torch.arange(side, dtype=torch.float64)[:, None] * omega
    waves = torch.cat([place.sin(), place.cos()], dim=1)
    y, x = waves.repeat_interleave(side, 0), waves.repeat(side, 1)
    return torch.cat([x, y], dim=1).float()


class PatchEmbedding(nn.Module):
    """Class token if there is one, then the (kept) patches of uint8 images, all with positions."""

    def __init__(
        self,
        dim: int,
        *,
        image_size: int,
        patch_size: int,
        bias: bool,
        position: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        class_token: bool = True,
    ) -> None:
        super().__init__()
        side = image_size // patch_size
        self.patch_size, self.mean, self.std = patch_size, mean, std
        self.weight = nn.Parameter(torch.empty(dim, 3, patch_size, patch_size))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.class_token = nn.Parameter(torch.zeros(dim)) if class_token else None
        first = int(class_token)
        if position == "learned":
            self.position = nn.Parameter(torch.empty(first + side * side, dim))
        else:
            self.register_buffer(
                "position", torch.cat([torch.zeros(first, dim), sincos_positions(dim, side)])
            )

    def forward(self, images: Tensor, keep_ids: Tensor | None = None) -> Tensor:
        """images (B, H, W, 3) uint8, keep_ids (B, K) int64 or None -> (B, 1 + K, dim), or
        (B, K, dim) without a class token.
        """
        patches = patch_embed(
            images,
            self.weight,
            self.bias,
            self.position if self.class_token is None else self.position[1:],
            keep_ids,
            patch_size=self.patch_size,
            mean=self.mean,
            std=self.std,
        )
        if self.class_token is None:
            return patches
        class_token = (self.class_token + self.position[0]).to(patches.dtype)
        return torch.cat([class_token.expand(patches.shape[0], 1, -1), patches], dim=1)


class TokenEmbedding(nn.Module):
    """Token, position and (BERT) token-type vectors summed; optional LayerNorm."""

    def __init__(
        self,
        dim: int,
        *,
        vocab_size: int,
        context_length: int,
        token_types: int,
        norm_eps: float | None,
    ) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(vocab_size, dim))
        self.position = nn.Parameter(torch.empty(context_length, dim))
        self.token_type = nn.Parameter(torch.empty(token_types, dim)) if token_types else None
        self.norm = ResidualNorm(dim, norm_eps) if norm_eps is not None else None

    def forward(self, text: Ragged, start: int = 0) -> Tensor:
        """Packed ids (T,) -> (T, dim); the sequences' first tokens stand at position `start`.

        Raises:
            ValueError: a sequence may be longer than the position table.
        """
        end = start + text.max_len
        if end > self.position.shape[0]:
            raise ValueError(f"text must have at most {self.position.shape[0]} tokens, got {end}")
        positions = self.position[start + text.positions()]
        x = nn.functional.embedding(text.values, self.token) + positions
        if self.token_type is not None:
            x = x + self.token_type[0]
        return x if self.norm is None else self.norm(x)[0]
