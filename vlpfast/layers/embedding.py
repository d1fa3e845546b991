"""Front ends: image patches and text tokens to vectors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.images import Images
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


def bilinear_positions(table: Tensor, place: Tensor, grid: Tensor) -> Tensor:
    """Of a table of positions (G * G, D) what it says of places in other grids, (T, D): bilinearly,
    corner to corner (`F.interpolate` with `align_corners=True`).

    Args:
        table: of a square, row by row.
        place (T, 2): int64 row and column.
        grid (T, 2): int64 rows and columns of the grid of each.
    """
    side = math.isqrt(table.shape[0])
    exact = place * (side - 1) / (grid - 1).clamp(min=1)
    low = exact.floor().clamp(max=side - 1)
    share = (exact - low).to(table.dtype)[..., None]  # (T, 2, 1)
    (y, x), (below, right) = low.long().unbind(1), (low.long() + 1).clamp(max=side - 1).unbind(1)
    rows = [
        torch.lerp(table[row * side + x], table[row * side + right], share[:, 1])
        for row in (y, below)
    ]
    return torch.lerp(*rows, share[:, 0])


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
        mask_token: bool = False,
    ) -> None:
        super().__init__()
        side = image_size // patch_size
        self.patch_size, self.mean, self.std = patch_size, mean, std
        self.weight = nn.Parameter(torch.empty(dim, 3, patch_size, patch_size))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.class_token = nn.Parameter(torch.zeros(dim)) if class_token else None
        self.mask_token = nn.Parameter(torch.zeros(dim)) if mask_token else None
        first = int(class_token)
        if position == "none":
            self.position = None
        elif position == "learned":
            self.position = nn.Parameter(torch.empty(first + side * side, dim))
        else:
            self.register_buffer(
                "position", torch.cat([torch.zeros(first, dim), sincos_positions(dim, side)])
            )

    def forward(
        self,
        images: Tensor | Images,
        keep_ids: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor | Ragged:
        """images (B, H, W, 3) uint8, keep_ids (B, K) int64 or None -> (B, 1 + K, dim), or
        (B, K, dim) without a class token. Where `hidden` (B, P) bool is True, the mask token stands
        for the patch, at its position.

        Images of unlike sizes -> packed tokens of their own patches, whose positions are
        interpolated. Their `keep_ids` are numbers in an image's own raster, ascending; where it has
        fewer than K, all it has come first.
        """
        if isinstance(images, Images):
            if hidden is not None:
                raise ValueError("patches are hidden of images of one size: set data.max_aspect 1")
            return self._packed(images, keep_ids)
        places, first = self.position, 0
        if self.class_token is not None:
            first = 0 if places is None else places[0]
            places = None if places is None else places[1:]
        patches = patch_embed(
            images,
            self.weight,
            self.bias,
            places,
            keep_ids,
            patch_size=self.patch_size,
            mean=self.mean,
            std=self.std,
        )
        if hidden is not None:
            unseen = self.mask_token if places is None else self.mask_token + places
            patches = torch.where(hidden[..., None], unseen.to(patches.dtype), patches)
        if self.class_token is None:
            return patches
        class_token = (self.class_token + first).to(patches.dtype)
        return torch.cat([class_token.expand(patches.shape[0], 1, -1), patches], dim=1)

    def _packed(self, images: Images, keep_ids: Tensor | None) -> Ragged:
        """As `forward`, of images of unlike sizes. All sizes are known on the host."""
        if self.class_token is None or not isinstance(self.position, nn.Parameter):
            raise ValueError(
                "images of unlike sizes need a class token and learned positions: "
                "vision.class_token, vision.position 'learned'"
            )
        side, device, size = self.patch_size, images.pixels.device, len(images)
        grids = images.patches(side)
        lens = grids.prod(1)
        if keep_ids is not None:
            lens = lens.clamp(max=keep_ids.shape[1])
        total, longest = int(lens.sum()), int(lens.max()) if size else 0
        starts = F.pad(lens.cumsum(0), (1, 0))
        cu_seqlens = starts.to(device, torch.int32)
        rows = torch.arange(size).repeat_interleave(lens)
        ids = torch.arange(total) - starts[rows]
        rows, ids, grid = (t.to(device, non_blocking=True) for t in (rows, ids, grids[rows]))
        if keep_ids is not None:
            # Those that an image does not have are its last.
            ids = keep_ids[rows, ids]
        place = torch.stack([ids // grid[:, 1], ids % grid[:, 1]], 1)
        height, width = (extent // side for extent in images.pixels.shape[1:3])
        canvas = images.pixels[:, : height * side, : width * side]
        squares = canvas.unflatten(2, (width, side)).unflatten(1, (height, side))
        squares = squares[rows, place[:, 0], :, place[:, 1]]  # (T, P, P, 3)
        patches = patch_embed(
            squares, self.weight, self.bias, patch_size=side, mean=self.mean, std=self.std
        )[:, 0]
        patches = patches + bilinear_positions(self.position[1:], place, grid)
        first = (self.class_token + self.position[0]).to(patches.dtype).expand(size, -1)
        one_each = torch.arange(size + 1, dtype=torch.int32, device=device)
        own = Ragged(patches, cu_seqlens, longest)
        return Ragged.join(Ragged(first, one_each, 1), own).whole


class TokenEmbedding(nn.Module):
    """Token, position and (BERT) token-type vectors summed; optional LayerNorm. `more_positions`
    are for tokens that others add.
    """

    def __init__(
        self,
        dim: int,
        *,
        vocab_size: int,
        context_length: int,
        token_types: int,
        norm_eps: float | None,
        position: str = "learned",
        more_positions: int = 0,
    ) -> None:
        super().__init__()
        self.context_length = context_length
        self.token = nn.Parameter(torch.empty(vocab_size, dim))
        rows = context_length + more_positions
        learned = position == "learned"
        self.position = nn.Parameter(torch.empty(rows, dim)) if learned else None
        self.token_type = nn.Parameter(torch.empty(token_types, dim)) if token_types else None
        self.norm = ResidualNorm(dim, norm_eps) if norm_eps is not None else None

    def forward(self, text: Ragged, start: int = 0) -> Tensor:
        """Packed ids (T,) -> (T, dim); the sequences' first tokens stand at position `start`.

        Raises:
            ValueError: a sequence may be longer than `context_length`.
        """
        end = start + text.max_len
        if end > self.context_length:
            raise ValueError(f"text must have at most {self.context_length} tokens, got {end}")
        x = nn.functional.embedding(text.values, self.token)
        if self.position is not None:
            x = x + self.position[start + text.positions()]
        if self.token_type is not None:
            x = x + self.token_type[0]
        return x if self.norm is None else self.norm(x)[0]
