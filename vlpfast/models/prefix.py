"""Text that is written after an image's tokens in one sequence, and after a prompt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlpfast.layers.keys import KeyCache
from vlpfast.models.config import FusionConfig
from vlpfast.models.fusion import ConcatTower
from vlpfast.models.towers import TextTower
from vlpfast.ragged import Ragged


class PrefixTower(ConcatTower):
    """A causal decoder whose sequences hold an image tower's tokens, brought there by a linear
    connector.

    Source: Hao et al. 2022 (MetaLM), section 2, arXiv:2206.06336; no code was published.
    """

    def __init__(self, config: FusionConfig, image_dim: int) -> None:
        super().__init__(config)
        self.connector = nn.Linear(image_dim, config.dim)

    def image_keys(self, image_tokens: Tensor | Ragged) -> Ragged:
        """Image tokens (B, N, D_image) -> packed tokens (B * N, D)."""
        return Ragged.from_dense(self.connector(image_tokens))


def decode_in_sequence(
    embed: TextTower,
    tower: ConcatTower,
    text: Ragged,
    keys: Ragged,
    kv_index: Tensor,
    prompt: Ragged | None,
    tokens: Ragged | None,
    cache: KeyCache | None,
    seed: int,
) -> Ragged:
    """`VLPModel.decode` where a text follows its image in one sequence.

    Semi-causal: the image is block 0, the prompt block 1, token t of the text block 2 + t, and a
    token sees its own block and those before. The cache's first call writes all three into it.

    Raises:
        ValueError: a cache is given, and image, prompt and text together differ in length.
    """
    if cache is not None and cache.prefix:
        return tower.proceed(embed(text, seed, cache), cache, seed)
    joined, whole, blocks = None, text, 2 + text.positions()
    if prompt is not None:
        joined = Ragged.join(prompt, text)
        whole, pieces = joined.whole, joined.pieces
        blocks = torch.where(pieces.row_ids() % 2 == 1, 2 + pieces.positions(), 1)
    if cache is not None and whole.values.shape[0] != len(whole) * whole.max_len:
        raise ValueError("decode: with a cache, prompts must be of one length, and texts too")
    if tokens is None or prompt is not None:
        tokens = embed(whole, seed)
    states = tower(tokens, keys, kv_index, seed, text_blocks=blocks, cache=cache).text
    if joined is None:
        return states
    if cache is not None:
        cache.advance(prompt.max_len)
    return joined.part(1, states.values)
