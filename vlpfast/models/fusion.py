"""Where texts and images meet: by cross-attention, or as one sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlpfast.layers.block import Block, CrossKeys, Layout
from vlpfast.layers.keys import KeyCache, KeyNorm
from vlpfast.models.config import FusionConfig
from vlpfast.models.outputs import FusedOutput
from vlpfast.models.stack import final_norm, finish, make_blocks, run_blocks
from vlpfast.models.towers import TextTower
from vlpfast.ragged import Joined, Ragged


class ImageKeys(NamedTuple):
    """Keys and values of all fusion layers, (B, N, layers, 2, H, E), projected once per image; and
    the same as parts (B, N, H, E), each layer's keys and then its values.
    """

    kv: Tensor
    parts: tuple[Tensor, ...]

    @classmethod
    def of(cls, kv: Tensor) -> ImageKeys:
        """Split once: the gradient of each indexing by itself would be as large as `kv`."""
        return cls(kv, kv.flatten(-4, -3).unbind(-3))

    def layer(self, number: int, kv_index: Tensor) -> CrossKeys:
        """What layer `number` reads, and which image each text row reads."""
        k, v = self.parts[2 * number : 2 * number + 2]
        return CrossKeys(k, v, kv_index)

    def select(self, images: Tensor) -> ImageKeys:
        """Keys of the images `images` (R,) int64."""
        return ImageKeys.of(self.kv[images])


class FusionTower(nn.Module):
    """Text blocks that read images by cross-attention (ALBEF).

    One GEMM projects keys and values for all layers.
    """

    def __init__(self, config: FusionConfig, image_dim: int) -> None:
        super().__init__()
        self.heads, self.depth, self.causal = config.heads, config.depth, config.causal
        self.key_norm = (
            KeyNorm(image_dim, config.depth, config.norm_eps) if config.key_norm else None
        )
        self.image_kv = nn.Linear(image_dim, config.depth * 2 * config.dim)
        self.blocks = make_blocks(config, cross=True, mlp_between=config.mlp_between)
        self.norm = final_norm(config)

    def image_keys(self, image_tokens: Tensor) -> ImageKeys:
        """Image tokens (B, N, D_image) -> keys and values of every layer."""
        if self.key_norm is None:
            kv = self.image_kv(image_tokens)
        else:
            kv = self.key_norm(image_tokens, self.image_kv)
        return ImageKeys.of(kv.unflatten(-1, (self.depth, 2, self.heads, -1)))

    def forward(
        self,
        text: Ragged,
        keys: ImageKeys,
        kv_index: Tensor,
        seed: int = 0,
        cache: KeyCache | None = None,
    ) -> FusedOutput:
        """With a `cache`, `text` goes on from the tokens that are in it."""
        blocks = "causal" if self.causal else None
        layout = Layout(text.cu_seqlens, text.max_len, blocks, cache=cache)
        read = lambda number: keys.layer(number, kv_index)
        state = run_blocks(self.blocks, (None, text.values), layout, seed, read=read)
        return FusedOutput(text.with_values(finish(self.norm, *state, seed)), None)


class ConcatTower(nn.Module):
    """Blocks over sequences that hold a text's tokens, then its image's (UNITER, ViLT)."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.modality = nn.Parameter(torch.empty(2, config.dim)) if config.modality_types else None
        self.blocks = make_blocks(config)
        self.norm = final_norm(config)

    def image_keys(self, image_tokens: Tensor | Ragged) -> Ragged:
        """Image tokens (B, N, D) or packed, as `forward` reads them: packed."""
        if isinstance(image_tokens, Ragged):
            return image_tokens
        return Ragged.from_dense(image_tokens)

    def alone(self, part: Ragged, modality: Literal["text", "image"], seed: int = 0) -> Ragged:
        """The stack over texts alone or images alone (R, packed tokens): rows whose other part is
        empty.
        """
        size, nothing = len(part), Ragged.empty(part.values)
        if modality == "text":
            first = torch.zeros(size, dtype=torch.int64, device=part.cu_seqlens.device)
            return self(part, nothing, first, seed).text
        own = torch.arange(size, device=part.cu_seqlens.device)
        return self(nothing.select(own * 0), part, own, seed).image

    def forward(
        self,
        text: Ragged,
        keys: Ragged,
        kv_index: Tensor,
        seed: int = 0,
        *,
        text_blocks: Tensor | None = None,
        cache: KeyCache | None = None,
    ) -> FusedOutput:
        """Row r joins text r and image `kv_index[r]`; nothing is padded.

        Args:
            text: packed tokens (T, D) of R texts.
            keys: packed tokens of the images.
            kv_index (R,): int64.
            seed: keys dropout in training.
            text_blocks (T,): int >= 0, which text tokens see each other (`ops.attention`); images
                are block 0, which all see. None: everything sees everything.
            cache: an empty one, which then holds all these tokens' keys for `proceed`; rows are of
                one length.
        """
        if self.modality is not None:
            text = text.with_values(text.values + self.modality[0])
            keys = keys.with_values(keys.values + self.modality[1])
        joined, blocks = Ragged.join(text, keys, kv_index), None
        if text_blocks is not None:
            of_images = keys.with_values(text_blocks.new_zeros(keys.values.shape[0]))
            blocks = Ragged.join(text.with_values(text_blocks), of_images, kv_index).pieces.values
        whole = joined.whole
        layout = Layout(whole.cu_seqlens, whole.max_len, blocks, cache=cache)
        values = self.run(whole.values, self._routed(layout, joined), seed)
        if cache is not None:
            cache.prefix = keys.max_len
        return FusedOutput(joined.part(0, values), joined.part(1, values))

    def proceed(self, text: Ragged, cache: KeyCache, seed: int = 0) -> Ragged:
        """States of text tokens (T, D) that go on from the sequences in `cache`."""
        if self.modality is not None:
            text = text.with_values(text.values + self.modality[0])
        layout = self._routed(Layout(text.cu_seqlens, text.max_len, cache=cache), text)
        return text.with_values(self.run(text.values, layout, seed))

    def run(self, tokens: Tensor, layout: Layout, seed: int) -> Tensor:
        """The blocks and the last norm over packed tokens (T, D)."""
        return finish(self.norm, *run_blocks(self.blocks, (None, tokens), layout, seed), seed)

    def _routed(self, layout: Layout, tokens: Joined | Ragged) -> Layout:
        """`layout` with what the blocks need to know of joined texts and images, or of text alone
        that goes on.
        """
        return layout


class ClassTower(ConcatTower):
    """Blocks over sequences with a class token of their own, which stands before the image's, of
    towers' states that a linear map each brings there (FLAVA).

    Source: Singh et al. 2022 (FLAVA), section 3.1, arXiv:2112.04482; transformers
    models/flava/modeling_flava.py, by which the states are those before the towers' last norms.
    Deviation: texts stand before images, which changes no number: no position is added here.
    """

    def __init__(self, config: FusionConfig, image_dim: int, text_dim: int) -> None:
        super().__init__(config)
        self.image_map = nn.Linear(image_dim, config.dim)
        self.text_map = nn.Linear(text_dim, config.dim)
        self.class_token = nn.Parameter(torch.empty(config.dim))

    def image_keys(self, image_tokens: Tensor) -> Ragged:
        """Image tokens (B, N, D_image) -> packed tokens (B * (1 + N), D), class token first."""
        tokens = self.image_map(image_tokens)
        first = self.class_token.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
        return Ragged.from_dense(torch.cat([first, tokens], 1))

    def forward(
        self, text: Ragged, keys: Ragged, kv_index: Tensor, seed: int = 0, **options
    ) -> FusedOutput:
        """As `ConcatTower`, `text` as its tower gives it; each image's first token is the class
        token.
        """
        mapped = text.with_values(self.text_map(text.values))
        return super().forward(mapped, keys, kv_index, seed, **options)


# What a causal decoder has of its own: BERT's attention with the norm that belongs to it.
_OF_SELF_ATTENTION = ("attention", "norm1")
_OF_TEXT = (*_OF_SELF_ATTENTION, "mlp", "norm2")
_OF_IMAGES = ("cross", "norm_cross")


def share_text(fusion: FusionTower, text: TextTower) -> None:
    """Makes the text tower and `fusion` one network: the same modules, but for cross-attention.

    Source: Li et al. 2022 (BLIP), section 3.1, arXiv:2201.12086; salesforce/BLIP models/med.py.
    """
    fusion.norm = text.norm
    for own, other in zip(fusion.blocks, text.blocks, strict=True):
        _tie(own, other, _OF_TEXT)


def tied_decoder(fusion: FusionTower, config: FusionConfig, image_dim: int) -> FusionTower:
    """A causal decoder that is `fusion` but for its self-attention; images' keys serve both.

    Source: salesforce/BLIP models/blip_pretrain.py, `tie_encoder_decoder_weights`, which passes
    over what is under "/attention": the projections and the norm after them.
    """
    decoder = FusionTower(replace(config, causal=True), image_dim)
    decoder.image_kv, decoder.norm = fusion.image_kv, fusion.norm
    for own, other in zip(decoder.blocks, fusion.blocks, strict=True):
        _tie(own, other, (*_OF_IMAGES, "mlp", "norm2"))
    return decoder


def _tie(block: Block, other: Block, parts: tuple[str, ...]) -> None:
    for part in parts:
        setattr(block, part, getattr(other, part))
