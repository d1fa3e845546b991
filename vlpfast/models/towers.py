"""The three stacks: vision, text and fusion, each of the two kinds of fusion a class.

Each takes tokens in and gives tokens out; heads and losses are elsewhere.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlpfast.layers.block import Block, CrossKeys, Layout, ResidualNorm
from vlpfast.layers.embedding import PatchEmbedding, TokenEmbedding
from vlpfast.layers.grid import GridEmbedding
from vlpfast.layers.keys import KeyCache, KeyNorm
from vlpfast.layers.moe import MoeBlock
from vlpfast.layers.pooler import MapPooler, QueryPooler
from vlpfast.layers.position_bias import RelativeBias, window_displacements
from vlpfast.layers.region import REGION_EMBEDDINGS
from vlpfast.models.config import FusionConfig, ModelConfig, StackConfig, TextConfig, VisionConfig
from vlpfast.models.outputs import FusedOutput
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged
from vlpfast.regions import Regions

# Of the names of parameters, which expert has them.
_EXPERT = re.compile(r"\.(text|image|joint)(?=\.)")


def _blocks(
    config: StackConfig, *, cross: bool = False, mlp_between: bool = False
) -> nn.ModuleList:
    experts = getattr(config, "moe_experts", 0)
    routed = {"num_experts": experts, "top_k": config.moe_top_k} if experts else {}
    return nn.ModuleList(
        (MoeBlock if experts and number % 2 == 0 else Block)(
            config.dim,
            config.heads,
            mlp_ratio=config.mlp_ratio,
            norm=config.norm,
            norm_eps=config.norm_eps,
            activation=config.activation,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            cross=cross,
            layer_scale=config.layer_scale,
            mlp_between=mlp_between,
            **(routed if number % 2 == 0 else {}),
        )
        for number in range(config.depth)
    )


def _final_norm(config: StackConfig) -> ResidualNorm | None:
    if config.norm == "post" or not config.depth:
        return None
    return ResidualNorm(config.dim, config.norm_eps, config.dropout)


def _finish(
    norm: ResidualNorm | None, branch: Tensor | None, residual: Tensor, seed: int
) -> Tensor:
    return residual if norm is None else norm(branch, residual, fold_seed(seed, -1))[0]


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
        return GridEmbedding(config.dim, config.cnn, patch_size=config.patch_size, **pixels)
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
    normalised. Regions -> packed tokens (T, D).
    """

    def __init__(self, config: VisionConfig, model: ModelConfig) -> None:
        super().__init__()
        self.embedding = _front_end(config, model)
        self.embed_norm = ResidualNorm(config.dim, config.norm_eps) if config.embed_norm else None
        self.relative_bias = _relative_bias(config, model)
        self.blocks = _blocks(config)
        self.norm = _final_norm(config)
        self.early_layers = config.early_layers
        self.head_blocks = _blocks(replace(config, depth=config.head_layers))
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
        self, images: Tensor | Regions, keep_ids: Tensor | None = None, seed: int = 0
    ) -> Tensor | Ragged:
        return self._read(images, keep_ids, seed)[0]

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
    ) -> tuple[Tensor | Ragged, Tensor | None]:
        if self.relative_bias is not None and keep_ids is not None:
            raise ValueError("keep_ids drops patches, and the relative bias is of all of them")
        mask = () if hidden is None else (hidden,)
        tokens, early = self.embedding(images, keep_ids, *mask), None
        packed = tokens if isinstance(tokens, Ragged) else None
        branch, residual = None, tokens if packed is None else packed.values
        if self.embed_norm is not None:
            residual, _ = self.embed_norm(residual)
        layout = Layout() if packed is None else Layout(packed.cu_seqlens, packed.max_len)
        layouts = self._layouts(layout)
        for number, block in enumerate(self.blocks):
            branch, residual = block(
                branch, residual, layouts[number], seed=fold_seed(seed, number)
            )
            if hidden is not None and number + 1 == self.early_layers:
                early = residual + branch
        if early is not None:
            out, last = self.norm(branch, residual, fold_seed(seed, -1))
            return out, self._class_head(torch.cat([last[:, :1], early[:, 1:]], 1), layouts, seed)
        out = _finish(self.norm, branch, residual, seed)
        if self.queries is not None:
            out = self.queries(out)
        return (out if packed is None else packed.with_values(out)), None

    def _class_head(self, tokens: Tensor, layouts: list[Layout], seed: int) -> Tensor:
        """The head's blocks and the tower's norm.

        Source: Peng et al. 2022 (BEiT v2), section 2.3, arXiv:2208.06366.
        """
        branch, residual = None, tokens
        for number, block in enumerate(self.head_blocks, start=len(self.blocks)):
            branch, residual = block(
                branch, residual, layouts[number], seed=fold_seed(seed, number)
            )
        return _finish(self.norm, branch, residual, fold_seed(seed, len(layouts)))

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
        self.blocks = _blocks(config)
        self.norm = _final_norm(config)

    def forward(self, x: Tensor, seed: int = 0) -> Tensor:
        branch, residual = None, self.embed(x) + self.position
        for number, block in enumerate(self.blocks):
            branch, residual = block(branch, residual, Layout(), seed=fold_seed(seed, number))
        return _finish(self.norm, branch, residual, seed)


class TextTower(nn.Module):
    """Packed token ids -> packed tokens (T, D); with `pool` "appended" each sequence has its class
    token at the end, and only that is normalised.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        appended = config.pool == "appended"
        self.embedding = TokenEmbedding(
            config.dim,
            vocab_size=config.vocab_size,
            context_length=config.context_length,
            more_positions=int(appended),
            token_types=config.token_types,
            norm_eps=config.norm_eps if config.embed_norm else None,
            position=config.position,
        )
        self.class_token = nn.Parameter(torch.empty(config.dim)) if appended else None
        self.causal = config.causal
        self.blocks = _blocks(config)
        self.norm = _final_norm(config)

    def forward(self, text: Ragged, seed: int = 0, cache: KeyCache | None = None) -> Ragged:
        """With a `cache`, `text` goes on from the tokens that are in it, and no class token ends
        it.
        """
        ids, start = text, 0 if cache is None else cache.length
        text = text.with_values(self.embedding(ids, start))
        if self.class_token is not None and cache is None:
            last = self.class_token + self.embedding.position[-1]
            text = text.append(last.to(text.values.dtype).expand(len(text), -1))
        branch, residual = None, text.values
        blocks = "causal" if self.causal else None
        layout = Layout(text.cu_seqlens, text.max_len, blocks, cache=cache)
        for number, block in enumerate(self.blocks):
            branch, residual = block(branch, residual, layout, seed=fold_seed(seed, number))
        if self.class_token is None:
            return text.with_values(_finish(self.norm, branch, residual, seed))
        out = residual + branch
        if cache is None:
            last = text.last()
            normed = self.norm(branch[last], residual[last], fold_seed(seed, -1))[0]
            out = out.index_copy(0, last, normed.to(out.dtype))
        return text.with_values(out)


class ImageKeys(NamedTuple):
    """Keys and values of all fusion layers, (B, N, layers, 2, H, E), projected once per image."""

    kv: Tensor

    def layer(self, number: int, kv_index: Tensor) -> CrossKeys:
        """What layer `number` reads, and which image each text row reads."""
        k, v = self.kv[:, :, number].unbind(2)
        return CrossKeys(k, v, kv_index)

    def select(self, images: Tensor) -> ImageKeys:
        """Keys of the images `images` (R,) int64."""
        return ImageKeys(self.kv[images])


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
        self.blocks = _blocks(config, cross=True, mlp_between=config.mlp_between)
        self.norm = _final_norm(config)

    def image_keys(self, image_tokens: Tensor) -> ImageKeys:
        """Image tokens (B, N, D_image) -> keys and values of every layer."""
        if self.key_norm is None:
            kv = self.image_kv(image_tokens)
        else:
            kv = self.key_norm(image_tokens, self.image_kv)
        return ImageKeys(kv.unflatten(-1, (self.depth, 2, self.heads, -1)))

    def forward(
        self,
        text: Ragged,
        keys: ImageKeys,
        kv_index: Tensor,
        seed: int = 0,
        cache: KeyCache | None = None,
    ) -> FusedOutput:
        """With a `cache`, `text` goes on from the tokens that are in it."""
        branch, residual = None, text.values
        blocks = "causal" if self.causal else None
        layout = Layout(text.cu_seqlens, text.max_len, blocks, cache=cache)
        for number, block in enumerate(self.blocks):
            branch, residual = block(
                branch, residual, layout, keys.layer(number, kv_index), fold_seed(seed, number)
            )
        return FusedOutput(text.with_values(_finish(self.norm, branch, residual, seed)), None)


class ConcatTower(nn.Module):
    """Blocks over sequences that hold a text's tokens, then its image's (UNITER, ViLT)."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.modality = nn.Parameter(torch.empty(2, config.dim)) if config.modality_types else None
        self.blocks = _blocks(config)
        self.norm = _final_norm(config)

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
        own = torch.arange(len(text), device=kv_index.device)
        pieces = torch.stack([own, len(text) + kv_index], 1).flatten()
        packed = Ragged.cat([text, keys]).select(pieces)
        blocks = None
        if text_blocks is not None:
            of_images = keys.with_values(text_blocks.new_zeros(keys.values.shape[0]))
            blocks = Ragged.cat([text.with_values(text_blocks), of_images]).select(pieces).values
        # Every other offset: a text and its image are one sequence.
        bounds, most = packed.cu_seqlens[::2].contiguous(), text.max_len + keys.max_len
        layout = self._routed(Layout(bounds, most, blocks, cache=cache), packed, own)
        packed = packed.with_values(self.run(packed.values, layout, seed))
        if cache is not None:
            cache.prefix = keys.max_len
        texts, images = packed.select(2 * own), packed.select(2 * own + 1)
        return FusedOutput(
            replace(texts, max_len=text.max_len), replace(images, max_len=keys.max_len)
        )

    def proceed(self, text: Ragged, cache: KeyCache, seed: int = 0) -> Ragged:
        """States of text tokens (T, D) that go on from the sequences in `cache`."""
        if self.modality is not None:
            text = text.with_values(text.values + self.modality[0])
        layout = self._routed(Layout(text.cu_seqlens, text.max_len, cache=cache), text, None)
        return text.with_values(self.run(text.values, layout, seed))

    def run(self, tokens: Tensor, layout: Layout, seed: int) -> Tensor:
        """The blocks and the last norm over packed tokens (T, D)."""
        branch, residual = None, tokens
        for number, block in enumerate(self.blocks):
            branch, residual = block(branch, residual, layout, seed=fold_seed(seed, number))
        return _finish(self.norm, branch, residual, seed)

    def _routed(self, layout: Layout, packed: Ragged, own: Tensor | None) -> Layout:
        """`layout` with what the blocks need to know of texts (pieces 2 r) and images (2 r + 1); of
        text that goes on, `own` is None.
        """
        return layout


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


@torch.no_grad()
def init_tower(tower: nn.Module, config: StackConfig) -> None:
    """Initial weights: pre-norm stacks by width and depth as CLIP, post-norm stacks N(0, 0.02) as
    BERT.

    Source: Radford et al. 2021, section 2.5 and open_clip transformer.py `init_parameters`; Devlin
    et al. 2019; for "sub" see `_init_sub_norm`.
    """
    post = config.norm == "post"
    attention_std = 0.02 if post else config.dim**-0.5
    output_std = 0.02 if post else (2 * max(config.depth, 1) * config.dim) ** -0.5
    hidden_std = 0.02 if post else (2 * config.dim) ** -0.5
    for full_name, parameter in tower.named_parameters():
        name = _EXPERT.sub("", full_name)
        if name.endswith(("qkv.weight", "q.weight", "kv.weight")):
            nn.init.normal_(parameter, std=attention_std)
        elif name.endswith(("out.weight", "fc2.weight")):
            nn.init.normal_(parameter, std=output_std)
        elif name.endswith("fc1.weight"):
            nn.init.normal_(parameter, std=hidden_std)
        elif name.endswith(("tag.weight", "expert.weight")):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif name.endswith(
            (
                "embedding.token",
                "token_type",
                "class_token",
                "mask_token",
                "modality",
                ".kind",
                "probe",
                "start",
            )
        ):
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith(".query"):
            nn.init.normal_(parameter)
        elif name.endswith("position"):
            nn.init.normal_(parameter, std=0.02 if post else 0.01)
        elif name.endswith("embedding.weight"):
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif ".cnn." in name and parameter.dim() == 4:
            nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
        elif name.endswith(("feature.weight", "box.weight", "cell.weight", "hidden_feature")):
            nn.init.normal_(parameter, std=0.02 if post else parameter.shape[-1] ** -0.5)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)
        if config.norm == "sub":
            _init_sub_norm(name, parameter, config)


def _init_sub_norm(name: str, parameter: Tensor, config: StackConfig) -> None:
    """Xavier's weights, those of values, outputs and MLPs times sqrt(log(2 * depth)).

    Source: Wang et al. 2022 (Magneto), figure 2, arXiv:2210.06423.
    """
    gain = math.log(2 * max(config.depth, 1)) ** 0.5
    if name.endswith(("out.weight", "fc1.weight", "fc2.weight")):
        nn.init.xavier_normal_(parameter, gain)
    elif name.endswith("qkv.weight"):
        # Queries and keys keep dim ** -0.5, which is Xavier's.
        parameter[2 * config.dim :].mul_(gain)
