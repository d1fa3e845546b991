"""An encoder of image and prompt, and a decoder that reads what it makes of them (PaLI,
Unified-IO).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlpfast.layers.block import CrossKeys
from vlpfast.layers.keys import KeyCache
from vlpfast.models.config import FusionConfig, StackConfig
from vlpfast.models.fusion import ConcatTower, FusionTower
from vlpfast.models.outputs import FusedOutput
from vlpfast.models.towers import TextTower
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged


class SourceKeys(NamedTuple):
    """Keys and values (T, H, E) of each decoder layer, as `ImageKeys.parts`, of packed sources: an
    image's tokens and its prompt, encoded once for all texts that follow them.
    """

    parts: tuple[Tensor, ...]
    cu_seqlens: Tensor
    max_len: int

    def layer(self, number: int, kv_index: Tensor) -> CrossKeys:
        """What layer `number` reads, and which source each text row reads."""
        k, v = self.parts[2 * number : 2 * number + 2]
        return CrossKeys(k, v, kv_index, self.cu_seqlens, self.max_len)


class Seq2SeqTower(nn.Module):
    """An encoder over prompt and image in one sequence, which see each other both ways, and a
    causal decoder with cross-attention; both of `config`'s shape. A linear connector brings the
    image tower's tokens to their width; what has it and has not been through a tower goes in as it
    is.

    Source: Chen et al. 2022 (PaLI), section 3.1, arXiv:2209.06794; no code was published. Its
        sequences have the image first: nothing here depends on the order.
    """

    def __init__(self, config: FusionConfig, image: StackConfig) -> None:
        super().__init__()
        connects = image.depth > 0 or image.dim != config.dim
        self.connector = nn.Linear(image.dim, config.dim) if connects else nn.Identity()
        self.encoder = ConcatTower(config)
        self.decoder = FusionTower(config, config.dim)

    def image_keys(self, image_tokens: Tensor) -> Ragged:
        """Image tokens (B, N, D_image) -> packed tokens (B * N, D), as the encoder takes them."""
        return Ragged.from_dense(self.connector(image_tokens))

    def read(
        self, prompt: Ragged, images: Ragged, image_index: Tensor, seed: int = 0
    ) -> SourceKeys:
        """Source r is prompt r, packed tokens (T, D), with image `image_index[r]` (R,) int64."""
        states = self.encoder(prompt, images, image_index, seed)
        source = Ragged.join(states.text, states.image).whole
        parts = self.decoder.image_keys(source.values).parts
        return SourceKeys(parts, source.cu_seqlens, source.max_len)

    def forward(
        self,
        text: Ragged,
        keys: SourceKeys,
        kv_index: Tensor,
        seed: int = 0,
        cache: KeyCache | None = None,
    ) -> FusedOutput:
        """The decoder over packed text tokens (T, D) of R texts, which read source `kv_index[r]`;
        with a `cache` they go on from the tokens that are in it.
        """
        return self.decoder(text, keys, kv_index, fold_seed(seed, -2), cache)


def decode_after_source(
    embed: TextTower,
    tower: Seq2SeqTower,
    text: Ragged,
    keys: Ragged | SourceKeys,
    kv_index: Tensor,
    prompt: Ragged | None,
    tokens: Ragged | None,
    cache: KeyCache | None,
    seed: int,
) -> Ragged:
    """`VLPModel.decode` of an encoder and a decoder: `keys` are images, each of which is encoded
    with its row's prompt here, or sources that have been.
    """
    if isinstance(keys, Ragged):
        keys = read_source(embed, tower, keys, kv_index, prompt, seed)
        kv_index = torch.arange(len(kv_index), device=kv_index.device)
    elif prompt is not None:
        raise ValueError("decode: a prompt is part of the sources that `read` has made")
    if cache is not None or tokens is None:
        tokens = embed(text, seed, cache)
    return tower(tokens, keys, kv_index, seed, cache).text


def read_source(
    embed: TextTower,
    tower: Seq2SeqTower,
    images: Ragged | None,
    image_index: Tensor,
    prompt: Ragged | None,
    seed: int,
) -> SourceKeys:
    """`Seq2SeqTower.read` of prompts' packed token ids; None: the sources are images alone, or
    without `images` prompts alone.
    """
    if images is None:
        words = embed(prompt, fold_seed(seed, -3))
        return tower.read(words, Ragged.empty(words.values), torch.zeros_like(image_index), seed)
    if prompt is None:
        nothing = Ragged.empty(images.values)
        words = nothing.select(torch.zeros_like(image_index))
    else:
        words = embed(prompt, fold_seed(seed, -3))
    return tower.read(words, images, image_index, seed)
