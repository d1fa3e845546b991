"""One encoder of everything (Uni-Perceiver): images, texts, both together, and the targets with
which they are compared.
"""

from __future__ import annotations

from dataclasses import replace
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.layers.block import Layout
from vlpfast.layers.keys import KeyCache
from vlpfast.layers.moe import MoeBlock, Routes
from vlpfast.models.config import FusionConfig
from vlpfast.models.fusion import ConcatTower
from vlpfast.models.outputs import FusedOutput
from vlpfast.ragged import Joined, Ragged


class Kind(IntEnum):
    """Kinds of tokens, as rows of `ATTRIBUTES`."""

    IMAGE = 0
    TEXT = 1
    WORD = 2
    FUSED_IMAGE = 3
    FUSED_TEXT = 4
    CAUSAL_TEXT = 5


# What routes a token: the task reads images; it predicts words; unused; every one; the token is of
# an image; of a text; of a target; it sees earlier tokens only.
# Source: fundamentalvision/Uni-Perceiver uniperceiver/datasets/moe_embeddings.py.
ATTRIBUTES = (
    (1, 0, 0, 1, 1, 0, 0, 0),
    (1, 0, 0, 1, 0, 1, 1, 0),
    (1, 1, 0, 1, 0, 1, 1, 0),
    (1, 1, 0, 1, 1, 0, 0, 0),
    (1, 1, 0, 1, 0, 1, 0, 0),
    (1, 1, 0, 1, 0, 1, 0, 1),
)


class SharedTower(ConcatTower):
    """Blocks over any sequence that begins with one learned token, whose output stands for the
    sequence once it is projected: of an image, of a text, of a word; or of a text and its image.

    Texts come with a start token; the learned one takes its place. In a text with its image it is
    the text's.

    Source: Zhu et al. 2022 (Uni-Perceiver), section 3, arXiv:2112.01522; fundamentalvision/
        Uni-Perceiver uniperceiver/modeling. Deviation: there the order is start, image, text, and
        the norm after the embeddings is one for both.
    """

    def __init__(self, config: FusionConfig, embed_dim: int) -> None:
        super().__init__(config)
        self.start = nn.Parameter(torch.empty(config.dim))
        self.project = nn.Linear(config.dim, embed_dim)
        kinds = torch.tensor(ATTRIBUTES, dtype=torch.float32)
        self.register_buffer("attributes", kinds, persistent=False)

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
        """As `ConcatTower`."""
        text = self.begin(text)
        return super().forward(text, keys, kv_index, seed, text_blocks=text_blocks, cache=cache)

    def begin(self, text: Ragged) -> Ragged:
        """Packed text tokens with the learned token for each start token."""
        start = self.start.to(text.values.dtype).expand(len(text), -1)
        return text.with_values(text.values.index_copy(0, text.first(), start))

    def encode_image(self, tokens: Tensor, seed: int = 0) -> Tensor:
        """Image tokens (B, N, D) -> features (B, E), of length 1."""
        start = self.start.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
        return self._encode(Ragged.from_dense(torch.cat([start, tokens], 1)), Kind.IMAGE, seed)

    def encode_text(self, text: Ragged, seed: int = 0, kind: Kind = Kind.TEXT) -> Tensor:
        """Packed text tokens (T, D) of B texts -> features (B, E), of length 1."""
        return self._encode(self.begin(text), kind, seed)

    def features(self, hidden: Tensor) -> Tensor:
        """Output tokens (n, D) -> (n, E), of length 1, at least fp32."""
        projected = self.project(hidden)
        wide = torch.promote_types(projected.dtype, torch.float32)
        return F.normalize(projected.to(wide), dim=-1)

    def loads(self, sizes: dict[Kind, int]) -> Tensor:
        """(L, 3, n) share of each expert of the L blocks that have some, for so many tokens of each
        kind.
        """
        routes = Routes(self._attributes(*sizes), tuple(sizes.values()))
        return torch.stack([b.load(routes) for b in self.blocks if isinstance(b, MoeBlock)])

    def _encode(self, packed: Ragged, kind: Kind, seed: int) -> Tensor:
        routes = Routes(self._attributes(kind), (packed.values.shape[0],))
        layout = Layout(packed.cu_seqlens, packed.max_len, routes=routes)
        return self.features(self.run(packed.values, layout, seed)[packed.first()])

    def _routed(self, layout: Layout, tokens: Joined | Ragged) -> Layout:
        if not isinstance(self.blocks[0], MoeBlock):
            return layout
        if isinstance(tokens, Ragged):
            routes = Routes(self._attributes(Kind.CAUSAL_TEXT), (tokens.values.shape[0],))
            return replace(layout, routes=routes)
        text = Kind.FUSED_TEXT if layout.blocks is None else Kind.CAUSAL_TEXT
        places = [tokens.token_ids(part) for part in (0, 1)]
        routes = Routes.of(self._attributes(text, Kind.FUSED_IMAGE), places)
        return replace(layout, routes=routes)

    def _attributes(self, *kinds: Kind) -> Tensor:
        return torch.stack([self.attributes[kind] for kind in kinds])
