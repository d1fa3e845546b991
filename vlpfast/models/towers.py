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
from vlpfast.layers.pooler import MapPooler
from vlpfast.layers.position_bias import RelativeBias, window_displacements
from vlpfast.layers.region import RegionEmbedding
from vlpfast.models.config import FusionConfig, ModelConfig, StackConfig, TextConfig, VisionConfig
from vlpfast.models.outputs import FusedOutput
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged
from vlpfast.regions import Regions

# Of the names of parameters, which expert has them.
_EXPERT = re.compile(r"\.(text|image|joint)(?=\.)")


def _blocks(config: StackConfig, *, cross: bool = False) -> nn.ModuleList:
    return nn.ModuleList(
        Block(
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
        )
        for _ in range(config.depth)
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
        return RegionEmbedding(config.dim, config.region_dim, config.norm_eps)
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
        self.pooler = (
            MapPooler(
                config.dim,
                config.heads,
                mlp_ratio=config.mlp_ratio,
                norm_eps=config.norm_eps,
                activation=config.activation,
            )
            if config.pool == "map"
            else None
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
            return self.pooler(tokens)
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
    """Packed token ids -> packed tokens (T, D)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embedding = TokenEmbedding(
            config.dim,
            vocab_size=config.vocab_size,
            context_length=config.context_length,
            token_types=config.token_types,
            norm_eps=config.norm_eps if config.embed_norm else None,
            position=config.position,
        )
        self.causal = config.causal
        self.blocks = _blocks(config)
        self.norm = _final_norm(config)

    def forward(self, text: Ragged, seed: int = 0) -> Ragged:
        branch, residual = None, self.embedding(text)
        layout = Layout(text.cu_seqlens, text.max_len, "causal" if self.causal else None)
        for number, block in enumerate(self.blocks):
            branch, residual = block(branch, residual, layout, seed=fold_seed(seed, number))
        return text.with_values(_finish(self.norm, branch, residual, seed))


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

    def __init__(self, config: StackConfig, image_dim: int) -> None:
        super().__init__()
        self.heads, self.depth = config.heads, config.depth
        self.image_kv = nn.Linear(image_dim, config.depth * 2 * config.dim)
        self.blocks = _blocks(config, cross=True)
        self.norm = _final_norm(config)

    def image_keys(self, image_tokens: Tensor) -> ImageKeys:
        """Image tokens (B, N, D_image) -> keys and values of every layer."""
        return ImageKeys(self.image_kv(image_tokens).unflatten(-1, (self.depth, 2, self.heads, -1)))

    def forward(
        self, text: Ragged, keys: ImageKeys, kv_index: Tensor, seed: int = 0
    ) -> FusedOutput:
        branch, residual = None, text.values
        layout = Layout(text.cu_seqlens, text.max_len)
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
    ) -> FusedOutput:
        """Row r joins text r and image `kv_index[r]`; nothing is padded.

        Args:
            text: packed tokens (T, D) of R texts.
            keys: packed tokens of the images.
            kv_index (R,): int64.
            seed: keys dropout in training.
            text_blocks (T,): int >= 0, which text tokens see each other (`ops.attention`); images
                are block 0, which all see. None: everything sees everything.
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
        layout = Layout(packed.cu_seqlens[::2].contiguous(), text.max_len + keys.max_len, blocks)
        branch, residual = None, packed.values
        for number, block in enumerate(self.blocks):
            branch, residual = block(branch, residual, layout, seed=fold_seed(seed, number))
        packed = packed.with_values(_finish(self.norm, branch, residual, seed))
        texts, images = packed.select(2 * own), packed.select(2 * own + 1)
        return FusedOutput(
            replace(texts, max_len=text.max_len), replace(images, max_len=keys.max_len)
        )


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
        elif name.endswith(
            (
                "embedding.token",
                "token_type",
                "class_token",
                "mask_token",
                "modality",
                ".kind",
                "probe",
            )
        ):
            nn.init.normal_(parameter, std=0.02)
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
