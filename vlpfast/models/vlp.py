"""VLPModel: every system of the field is a configuration of it.

It holds no loss and knows no data set.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.layers.block import ResidualNorm
from vlpfast.layers.region import RegionHeads
from vlpfast.models.config import ModelConfig, TextConfig
from vlpfast.models.encoders import CnnTower, GruTower
from vlpfast.models.experts import ExpertTower
from vlpfast.models.outputs import FusedOutput, ImageOutput, TextOutput
from vlpfast.models.presets import missing, preset_config
from vlpfast.models.tokenizer import VisualTokenizer
from vlpfast.models.towers import (
    ConcatTower,
    FusionTower,
    ImageKeys,
    TextTower,
    VisionTower,
    init_tower,
)
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged
from vlpfast.regions import Regions


def _full(x: Tensor) -> Tensor:
    """At least fp32: what leaves the model enters softmaxes and norms."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(_full(x), dim=-1)


class TokenHead(nn.Module):
    """What predicts tokens: BERT's transform (Linear, GELU, LayerNorm) where `transform`, then the
    vocabulary, whose weight is the token table itself where `tied`.
    """

    def __init__(
        self, dim: int, vocab_size: int, norm_eps: float, *, transform: bool, tied: bool
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim) if transform else None
        self.norm = ResidualNorm(dim, norm_eps) if transform else None
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, dim))
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """The transform alone."""
        return hidden if self.dense is None else self.norm(F.gelu(self.dense(hidden)))[0]


class JointHeads(nn.Module):
    """The second pair of projections into a joint space, and its scale (VLMo)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.image = nn.Linear(config.fusion.dim, config.embed_dim, config.projection_bias)
        self.text = nn.Linear(config.fusion.dim, config.embed_dim, config.projection_bias)
        self.scale = nn.Parameter(torch.tensor(math.log(config.scale_init)))


class VLPModel(nn.Module):
    """Vision tower, text tower, optional fusion tower, poolers and heads.

    Args:
        config: see `ModelConfig`; build one by `preset_config` or use `create_model`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        vision, text, fusion = config.vision, config.text, config.fusion
        self.vision = (CnnTower if vision.front == "cnn" else VisionTower)(vision, config)
        self.text = _text_tower(text)
        self.fusion = _fusion_tower(config)
        self.image_projection = _projection(config, vision.dim, config.image_projection)
        self.text_projection = _projection(config, text.dim, config.text_projection)
        self.joint_heads = JointHeads(config) if config.joint_embedding else None
        self.pooler = nn.Linear(fusion.dim, fusion.dim) if fusion.pooler else None
        matches = fusion.depth and config.match_head
        self.match_head = nn.Linear(fusion.dim, 2) if matches else None
        self.token_head = (
            TokenHead(
                text.dim,
                text.vocab_size,
                text.norm_eps,
                transform=config.mlm_transform,
                tied=config.mlm_tied,
            )
            if config.mlm_head
            else None
        )
        self.region_heads = (
            RegionHeads(fusion.dim, vision.region_dim, vision.region_classes, fusion.norm_eps)
            if config.region_heads
            else None
        )
        self.code_head = nn.Linear(vision.dim, config.codes) if config.codes else None
        # 256 values of each of three channels.
        self.color_head = nn.Linear(vision.dim, 3 * 256) if config.color_head else None
        self.tokenizer = (
            VisualTokenizer(config.codebook, vision, config.num_patches)
            if config.codebook.size
            else None
        )
        init = math.log(config.scale_init) if config.scale == "log" else 1 / config.scale_init
        scale = torch.tensor(init)
        if not config.embed_dim:
            self.scale = None
        elif config.scale == "none":
            self.register_buffer("scale", scale, persistent=False)
        else:
            self.scale = nn.Parameter(scale)
        self.logit_bias = (
            nn.Parameter(torch.tensor(config.logit_bias_init)) if config.logit_bias else None
        )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws fresh weights from torch's default generator; see `init_tower`."""
        for tower, stack in ((self.vision, self.config.vision), (self.text, self.config.text)):
            if isinstance(tower, CnnTower | GruTower):
                tower.init_weights()
            elif tower is not None:
                init_tower(tower, stack)
        if self.fusion is not None:
            init_tower(self.fusion, self.config.fusion)
        for projection in (self.image_projection, self.text_projection):
            if isinstance(projection, nn.Linear):
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        if self.joint_heads is not None:
            for projection in (self.joint_heads.image, self.joint_heads.text):
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        if self.tokenizer is not None:
            self.tokenizer.init_weights()
        heads = (
            self.match_head,
            self.token_head,
            self.pooler,
            self.region_heads,
            self.code_head,
            self.color_head,
        )
        for head in (m for part in heads if part is not None for m in part.modules()):
            if isinstance(head, nn.Linear):
                nn.init.normal_(head.weight, std=0.02)
                nn.init.zeros_(head.bias)
            elif isinstance(head, TokenHead) and head.weight is not None:
                nn.init.normal_(head.weight, std=0.02)

    @property
    def has_fusion(self) -> bool:
        """Whether image and text meet in a fusion tower."""
        return self.fusion is not None

    @property
    def has_joint_space(self) -> bool:
        """Whether images and texts are embedded where they can be compared."""
        return self.config.embed_dim > 0

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return next(self.parameters()).device

    @property
    def logit_scale(self) -> Tensor:
        """0-d multiplier of the cosine similarities."""
        self._need(self.scale, "a joint space")
        return self.scale.exp() if self.config.scale == "log" else 1 / self.scale

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keeps the multiplier within [scale_min, scale_max]; called after each optimizer step."""
        if self.scale is None:
            return
        low, high = self.config.scale_min, self.config.scale_max
        if self.config.scale == "log":
            bounds = [math.log(bound) if bound > 0 else None for bound in (low, high)]
        else:
            bounds = [1 / bound if bound > 0 else None for bound in (high, low)]
        if bounds != [None, None] and self.config.scale != "none":
            self.scale.clamp_(*bounds)
            if self.joint_heads is not None:
                self.joint_heads.scale.clamp_(*bounds)

    def encode_image(
        self,
        images: Tensor | Regions,
        keep_ids: Tensor | None = None,
        *,
        seed: int = 0,
        hidden: Tensor | None = None,
        num_embedded: int | None = None,
    ) -> ImageOutput:
        """Image tower and its projection; where one stack serves both modalities, that stack on
        images alone is the tower, and the tokens are what enters it.

        Args:
            images (B, S, S, 3): uint8, S = config.image_size; or what a detector saw in B images,
                where `config.vision.front` is "regions".
            keep_ids (B, K): int64 ascending ids of the patches to embed; None keeps all.
            seed: keys dropout in training.
            hidden (B, P): bool, the patches for which the mask token stands; of all patches, so
                without `keep_ids`.
            num_embedded: of how many images, the first ones, an embedding is wanted; None: all.
        """
        side, wants_regions = self.config.image_size, self.config.vision.front == "regions"
        if isinstance(images, Regions) != wants_regions:
            raise TypeError(
                f"preset {self.config.preset!r} reads {'regions' if wants_regions else 'pixels'}, "
                f"got {type(images).__name__}"
            )
        if not wants_regions and images.shape[1:] != (side, side, 3):
            raise ValueError(f"images must be (B, {side}, {side}, 3), got {tuple(images.shape)}")
        class_head = None
        if hidden is None:
            tokens = self.vision(images, keep_ids, seed)
        else:
            self._need(self.color_head or self.code_head, "a code head")
            tokens, class_head = self.vision.masked(images, hidden, seed)
        if self.image_projection is None or num_embedded == 0:
            return ImageOutput(tokens, None, class_head)
        embedded = tokens[:num_embedded] if isinstance(tokens, Tensor) else tokens
        if self.config.one_stack:
            packed = self.fusion.image_keys(embedded)
            own, joint = self._embed_alone(packed, "image", seed)
            return ImageOutput(tokens, own, joint_embedding=joint)
        pooled = self.vision.pool(embedded)
        if self.config.vision.unit_features:
            pooled = _unit(pooled).to(pooled.dtype)
        return ImageOutput(tokens, _unit(self.image_projection(pooled)), class_head)

    def encode_text(
        self, text: Ragged, *, seed: int = 0, num_embedded: int | None = None
    ) -> TextOutput:
        """Text tower and its projection; where one stack serves both modalities as `encode_image`.

        Args:
            text: packs int64 token ids with their start and end tokens.
            seed: keys dropout in training.
            num_embedded: of how many texts, the first ones, an embedding is wanted; None: all.
        """
        self._need(self.text, "a text tower")
        tokens = self.text(text, seed)
        if self.text_projection is None or num_embedded == 0:
            return TextOutput(tokens, None)
        embedded = tokens
        if num_embedded is not None and num_embedded < len(tokens):
            embedded = tokens.select(torch.arange(num_embedded, device=tokens.values.device))
        if self.config.one_stack:
            return TextOutput(tokens, *self._embed_alone(embedded, "text", seed))
        first = self.config.text.pool == "first"
        pooled = embedded.values[embedded.first() if first else embedded.last()]
        return TextOutput(tokens, _unit(self.text_projection(pooled)))

    def image_states(self, tokens: Tensor) -> Tensor:
        """What the image tower makes of images (B, N, D), from `encode_image`'s tokens: themselves,
        or where one stack serves both modalities its states on images alone.
        """
        if not self.config.one_stack:
            return tokens
        alone = self.fusion.alone(self.fusion.image_keys(tokens), "image")
        return alone.values.unflatten(0, tokens.shape[:2])

    def _embed_alone(
        self, part: Ragged, modality: Literal["text", "image"], seed: int
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings (R, E) of the first states of the stack on one modality alone; the second is
        None where there are no joint heads.
        """
        project = self.text_projection if modality == "text" else self.image_projection
        seed, first = fold_seed(seed, 1), part.first()
        if self.joint_heads is None:
            return _unit(project(self.fusion.alone(part, modality, seed).values[first])), None
        own, joint = self.fusion.alone_twice(part, modality, seed)
        head = getattr(self.joint_heads, modality)
        return _unit(project(own.values[first])), _unit(head(joint.values[first]))

    def image_keys(self, image_tokens: Tensor | Ragged) -> ImageKeys | Ragged:
        """What `fuse` reads of images (B, N, D) or packed, once for any number of texts: keys and
        values of all fusion layers by one GEMM, or ("concat") the packed tokens.
        """
        self._need(self.fusion, "a fusion tower")
        return self.fusion.image_keys(image_tokens)

    def fuse(
        self, text_tokens: Ragged, keys: ImageKeys | Ragged, kv_index: Tensor, *, seed: int = 0
    ) -> Ragged:
        """Text row r of `text_tokens` reads image `kv_index[r]` (int64) of `keys` -> packed fused
        tokens (T, D).
        """
        return self.fuse_pairs(text_tokens, keys, kv_index, seed=seed, images=False).text

    def fuse_pairs(
        self,
        text_tokens: Ragged,
        keys: ImageKeys | Ragged,
        kv_index: Tensor,
        *,
        seed: int = 0,
        text_blocks: Tensor | None = None,
        images: bool = True,
    ) -> FusedOutput:
        """`fuse` with the fused image tokens too, unless `images` says that they are not wanted;
        `text_blocks` as `ConcatTower.forward`, where one stack serves both modalities.
        """
        self._need(self.fusion, "a fusion tower")
        options: dict[str, Tensor | bool] = {}
        if text_blocks is not None:
            self._need(self.fusion if self.config.one_stack else None, "one stack for both")
            options["text_blocks"] = text_blocks
        if not images and self.config.fusion.experts != "shared":
            options["images"] = False
        return self.fusion(text_tokens, keys, kv_index, seed, **options)

    def match(self, fused: Ragged) -> Tensor:
        """Image-text matching logits (R, 2) from the first token of each row; index 1 says "they
        match".
        """
        return self.match_logits(fused.values[fused.first()])

    def match_logits(self, first_tokens: Tensor) -> Tensor:
        """`match` on first tokens (R, D) already taken."""
        self._need(self.match_head, "a matching head")
        return _full(self.match_head(self.pool(first_tokens)))

    def pool(self, first_tokens: Tensor) -> Tensor:
        """What the matching head reads of first tokens (R, D): BERT's pooler where there is one."""
        return first_tokens if self.pooler is None else self.pooler(first_tokens).tanh()

    def region_features(self, hidden: Tensor) -> Tensor:
        """Features (n, region_dim) of hidden regions from their fused tokens (n, D)."""
        self._need(self.region_heads, "region heads")
        return _full(self.region_heads.features(hidden, self.vision.embedding))

    def region_logits(self, hidden: Tensor) -> Tensor:
        """Class logits (n, region_classes) of hidden regions from their fused tokens (n, D)."""
        self._need(self.region_heads, "region heads")
        return _full(self.region_heads.logits(hidden))

    def patches(self, tokens: Tensor) -> Tensor:
        """Of image tokens (B, N, D) those of patches, (B, P, D)."""
        return tokens[:, -self.config.num_patches :]

    def code_head_inputs(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (n, D), weight (K, D) and bias (K,) of the code head: what
        `ops.linear_cross_entropy` takes.
        """
        self._need(self.code_head, "a code head")
        return hidden, self.code_head.weight, self.code_head.bias

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., K) of codes from hidden states (..., D)."""
        return _full(F.linear(*self.code_head_inputs(hidden)))

    def color_logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., 3, 256) of mean colours from hidden states (..., D)."""
        self._need(self.color_head, "a color head")
        return _full(self.color_head(hidden)).unflatten(-1, (3, 256))

    def image_codes(self, images: Tensor) -> Tensor:
        """A tokenizer's codes (B, P) int64 of images (B, S, S, 3) uint8."""
        self._need(self.tokenizer, "a codebook")
        return self.tokenizer.codes(self.patches(self.encode_image(images).tokens))

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits (n, V) of hidden states (n, D)."""
        return _full(F.linear(*self.token_head_inputs(hidden)))

    def token_head_inputs(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Transformed hidden states (n, D), vocabulary weight (V, D) and bias (V,): what
        `ops.linear_cross_entropy` takes.
        """
        self._need(self.token_head, "a token head")
        head = self.token_head
        weight = self.text.embedding.token if head.weight is None else head.weight
        return head(hidden), weight, head.bias

    def _need(self, part: nn.Module | Tensor | None, what: str) -> None:
        if part is None:
            raise ValueError(missing(self.config.preset, what))


def _text_tower(config: TextConfig) -> TextTower | GruTower | None:
    if config.kind == "none":
        return None
    return (GruTower if config.kind == "gru" else TextTower)(config)


def _fusion_tower(model: ModelConfig) -> FusionTower | ConcatTower | ExpertTower | None:
    config = model.fusion
    if not config.depth:
        return None
    if config.experts != "shared":
        return ExpertTower(config, model)
    return ConcatTower(config) if config.kind == "concat" else FusionTower(config, model.vision.dim)


def _projection(config: ModelConfig, width: int, wanted: bool) -> nn.Module | None:
    """Into the joint space: None where the model has none, the identity where it is the tower's."""
    if not config.embed_dim:
        return None
    return nn.Linear(width, config.embed_dim, config.projection_bias) if wanted else nn.Identity()


def create_model(preset: str, size: str = "tiny", **overrides) -> VLPModel:
    """A freshly initialised model; arguments as `preset_config`.

    Example: `create_model("albef", size="tiny", vocab_size=4096, image_size=64)`.
    """
    return VLPModel(preset_config(preset, size, **overrides))
