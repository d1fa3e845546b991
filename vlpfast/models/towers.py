"""The vision and the text tower: patches or regions, or words, through a stack of blocks.

Each takes tokens in and gives tokens out; heads and losses are elsewhere.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vlpfast.layers.block import Layout, Leaving, ResidualNorm
from vlpfast.layers.embedding import PatchEmbedding, TokenEmbedding
from vlpfast.layers.grid import GridEmbedding
from vlpfast.layers.keys import KeyCache
from vlpfast.layers.pooler import MapPooler, QueryPooler
from vlpfast.layers.position_bias import RelativeBias, window_displacements
from vlpfast.layers.region import REGION_EMBEDDINGS
from vlpfast.models.config import ModelConfig, StackConfig, TextConfig, VisionConfig
from vlpfast.models.stack import final_norm, finish, make_blocks, run_blocks
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged
from vlpfast.regions import Regions


def _relative_bias(config: VisionConfig, model: ModelConfig) -> RelativeBias | None:
    if config.relative_bias == "none":
        return None
    window = window_displacements(model.image_size // config.patch_size)
    layers = config.depth + config.head_layers if config.relative_bias == "layer" else 1
    return RelativeBias(config.heads, *window, layers)


def _front_end(config: VisionConfig, model: ModelConfig) -> nn.Module:
    pixels = {"mean": model.image_mean, "std": model.image_std}
    if config.front == "regions":
        return REGION_EMBEDDINGS[config.region_kind](config.dim, config.region_dim, config.norm_eps)
    if config.front == "grid":
        hideable = model.num_patches if model.hides_patches else 0
        return GridEmbedding(
            config.dim, config.cnn, patch_size=config.patch_size, hideable=hideable, **pixels
        )
    return PatchEmbedding(
        config.dim,
        image_size=model.image_size,
        patch_size=config.patch_size,
        bias=config.patch_bias,
        position=config.position,
        class_token=config.class_token,
        mask_token=model.hides_patches,
        **pixels,
    )


class VisionTower(nn.Module):
    """uint8 images -> tokens (B, 1 + K, D), class token first (a grid has none, nor has SigLIP),
    normalised, but where fusion has a class token. Regions -> packed tokens (T, D).
    """

    def __init__(self, config: VisionConfig, model: ModelConfig) -> None:
        super().__init__()
        self.embedding = _front_end(config, model)
        self.embed_norm = ResidualNorm(config.dim, config.norm_eps) if config.embed_norm else None
        self.relative_bias = _relative_bias(config, model)
        self.blocks = make_blocks(config)
        self.norm, self.bare = final_norm(config), model.fusion.class_token
        self.early_layers = config.early_layers if config.early_layers <= config.depth else 0
        early, head = config.early_layers, config.head_layers
        self.head_blocks = make_blocks(
            replace(config, depth=head), first=early, of=max(config.depth, early + head)
        )
        queries = lambda count: QueryPooler(config.dim, config.heads, count, config.norm_eps)
        self.queries = queries(config.num_queries) if config.num_queries else None
        self.pooler = queries(1) if config.pool == "cascade" else None
        if config.pool == "map":
            self.pooler = MapPooler(
                config.dim,
                config.heads,
                mlp_ratio=config.mlp_ratio,
                norm_eps=config.norm_eps,
                activation=config.activation,
            )
        self.mean_pool = config.pool == "mean"

    def forward(
        self,
        images: Tensor | Regions,
        keep_ids: Tensor | None = None,
        seed: int = 0,
        *,
        pooled_only: bool = False,
    ) -> Tensor | Ragged:
        """With `pooled_only` of the tokens those that `pool` reads."""
        return self._read(images, keep_ids, seed, pooled_only=pooled_only)[0]

    def masked(self, images: Tensor, hidden: Tensor, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """Tokens of images whose patches `hidden` (B, P) bool the mask token stands for, and what
        the class token's head makes of them, (B, 1 + P, D) each; None without such a head.
        """
        return self._read(images, None, seed, hidden)

    def _read(
        self,
        images: Tensor | Regions,
        keep_ids: Tensor | None,
        seed: int,
        hidden: Tensor | None = None,
        pooled_only: bool = False,
    ) -> tuple[Tensor | Ragged, Tensor | None]:
        if self.relative_bias is not None and keep_ids is not None:
            raise ValueError("keep_ids drops patches, and the relative bias is of all of them")
        mask = () if hidden is None else (hidden,)
        tokens = self.embedding(images, keep_ids, *mask)
        packed = tokens if isinstance(tokens, Ragged) else None
        residual = tokens if packed is None else packed.values
        if self.embed_norm is not None:
            residual, _ = self.embed_norm(residual)
        layout = Layout() if packed is None else Layout(packed.cu_seqlens, packed.max_len)
        layouts, early = self._layouts(layout), 0 if hidden is None else self.early_layers
        blocks = list(self.blocks)
        state = run_blocks(blocks[:early], (None, residual), layouts, seed)
        if early:
            patches = (state[1] + state[0])[:, 1:]
        first_only = pooled_only and packed is None and self._pools_first
        leaving = Leaving(Layout()) if first_only else None
        state = run_blocks(blocks[early:], state, layouts, seed, first=early, leaving=leaving)
        if early:
            out, last = self.norm(*state, fold_seed(seed, -1))
            return out, self._class_head(torch.cat([last[:, :1], patches], 1), layouts, seed)
        out = finish(self.norm, *state, seed, bare=self.bare)
        if self.queries is not None:
            out = self.queries(out)
        return (out if packed is None else packed.with_values(out)), None

    @property
    def _pools_first(self) -> bool:
        """Whether only the class token is pooled, and nothing is added to its scores."""
        return not (self.mean_pool or self.pooler or self.queries or self.relative_bias)

    def _class_head(self, tokens: Tensor, layouts: list[Layout], seed: int) -> Tensor:
        """The head's blocks and the tower's norm.

        Source: Peng et al. 2022 (BEiT v2), section 2.3, arXiv:2208.06366.
        """
        first = len(self.blocks)
        state = run_blocks(self.head_blocks, (None, tokens), layouts, seed, first=first)
        return finish(self.norm, *state, fold_seed(seed, len(layouts)))

    def _layouts(self, layout: Layout) -> list[Layout]:
        """`layout` with each layer's bias, the head's blocks last."""
        count = len(self.blocks) + len(self.head_blocks)
        if self.relative_bias is None:
            return [layout] * count
        biases = self.relative_bias().unbind()
        biases *= count // len(biases)
        return [replace(layout, bias=bias) for bias in biases]

    def pool(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, D), as `VisionConfig.pool` says."""
        if self.pooler is not None:
            return self.pooler(tokens).flatten(1)
        return tokens.mean(1) if self.mean_pool else tokens[:, 0]


class PatchDecoder(nn.Module):
    """Vectors (B, P, d) of all patches, with positions, through blocks -> tokens (B, P, D)."""

    def __init__(self, config: StackConfig, in_dim: int, num_patches: int) -> None:
        super().__init__()
        self.embed = nn.Linear(in_dim, config.dim)
        self.position = nn.Parameter(torch.empty(num_patches, config.dim))
        self.blocks = make_blocks(config)
        self.norm = final_norm(config)

    def forward(self, x: Tensor, seed: int = 0) -> Tensor:
        x = self.embed(x) + self.position
        return finish(self.norm, *run_blocks(self.blocks, (None, x), Layout(), seed), seed)


class TextTower(nn.Module):
    """Packed token ids -> packed tokens (T, D), normalised unless `bare`; with `pool` "appended"
    each sequence has its class token at the end, and only that is normalised.
    """

    def __init__(self, config: TextConfig, bare: bool = False) -> None:
        super().__init__()
        appended = config.pool == "appended"
        self.embedding = TokenEmbedding(
            config.dim,
            vocab_size=config.num_ids,
            context_length=config.context_length,
            more_positions=int(appended),
            token_types=config.token_types,
            norm_eps=config.norm_eps if config.embed_norm else None,
            position=config.position,
        )
        self.class_token = nn.Parameter(torch.empty(config.dim)) if appended else None
        self.pooled = config.pool
        self.causal, self.bare = config.causal, bare
        self.blocks = make_blocks(config)
        self.norm = final_norm(config)

    def forward(
        self,
        text: Ragged,
        seed: int = 0,
        cache: KeyCache | None = None,
        *,
        pooled_only: bool = False,
    ) -> Ragged:
        """With a `cache`, `text` goes on from the tokens that are in it, and no class token ends
        it. With `pooled_only` each sequence has the token that is pooled and no other, where that
        one sees all.
        """
        ids, start = text, 0 if cache is None else cache.length
        text = text.with_values(self.embedding(ids, start))
        if self.class_token is not None and cache is None:
            last = self.class_token + self.embedding.position[-1]
            text = text.append(last.to(text.values.dtype).expand(len(text), -1))
        blocks = "causal" if self.causal else None
        layout = Layout(text.cu_seqlens, text.max_len, blocks, cache=cache)
        leaving = self._leaving(text) if pooled_only else None
        branch, residual = run_blocks(
            self.blocks, (None, text.values), layout, seed, leaving=leaving
        )
        if leaving is not None:
            text = Ragged(residual, leaving.layout.cu_seqlens, 1)
        if self.class_token is None:
            return text.with_values(finish(self.norm, branch, residual, seed, bare=self.bare))
        out = residual + branch
        if cache is None:
            last = text.last()
            normed = self.norm(branch[last], residual[last], fold_seed(seed, -1))[0]
            out = out.index_copy(0, last, normed.to(out.dtype))
        return text.with_values(out)

    def _leaving(self, text: Ragged) -> Leaving | None:
        """The pooled tokens, where they see all others."""
        blind = self.causal and self.pooled != "last"
        if blind or self.pooled == "appended" or not len(self.blocks):
            return None
        return Leaving.of(text, self.pooled)
