"""VLPModel: every system of the field is a configuration of it.

It holds no loss and knows no data set.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.layers.block import ResidualNorm
from vlpfast.layers.keys import KeyCache
from vlpfast.layers.region import RegionHeads
from vlpfast.models.config import ModelConfig
from vlpfast.models.encoders import CnnTower, GruTower
from vlpfast.models.outputs import FusedOutput, ImageOutput, TextOutput
from vlpfast.models.prefix import PrefixTower, decode_in_sequence
from vlpfast.models.presets import missing, preset_config
from vlpfast.models.shared import Kind, SharedTower
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
    """BERT's prediction transform:

    Linear, GELU, LayerNorm; the vocabulary weight is the token table itself.
    """

    def __init__(self, dim: int, vocab_size: int, norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = ResidualNorm(dim, norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(hidden)))[0]


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
        self.text = (GruTower if text.kind == "gru" else TextTower)(text)
        self.fusion = _fusion_tower(config)
        self.image_projection = _projection(config, vision.dim, config.image_projection)
        self.text_projection = _projection(config, text.dim, config.text_projection)
        self.pooler = nn.Linear(fusion.dim, fusion.dim) if fusion.pooler else None
        self.match_head = nn.Linear(fusion.dim, 2) if "a matching head" in config.parts else None
        self.lm_head = (
            nn.Linear(fusion.dim, text.vocab_size, bias=False)
            if config.lm_head == "linear"
            else None
        )
        self.token_head = (
            TokenHead(text.dim, text.vocab_size, text.norm_eps) if config.mlm_head else None
        )
        self.region_heads = (
            RegionHeads(fusion.dim, vision.region_dim, vision.region_classes, fusion.norm_eps)
            if config.region_heads
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
        self.task_scale = nn.ParameterDict(
            {task: torch.tensor(math.log(config.scale_init)) for task in config.task_scales}
        )
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
            else:
                init_tower(tower, stack)
        if self.fusion is not None:
            init_tower(self.fusion, self.config.fusion)
        for projection in (self.image_projection, self.text_projection):
            if isinstance(projection, nn.Linear):
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        shared = self.fusion.project if self.config.shared else None
        heads = (self.match_head, self.token_head, self.pooler, self.region_heads, self.lm_head)
        for head in (m for part in (*heads, shared) if part is not None for m in part.modules()):
            if isinstance(head, nn.Linear):
                nn.init.normal_(head.weight, std=0.02)
                if head.bias is not None:
                    nn.init.zeros_(head.bias)

    @property
    def has_fusion(self) -> bool:
        """Whether image and text meet in a fusion tower that reads both ways."""
        return "a fusion tower" in self.config.parts

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

    def scale_of(self, task: str) -> Tensor:
        """0-d multiplier of the cosine similarities of an objective: its own, or `logit_scale`."""
        return self.task_scale[task].exp() if task in self.task_scale else self.logit_scale

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keeps the multipliers within [scale_min, scale_max]; called after each optimizer step."""
        if self.scale is None:
            return
        low, high = self.config.scale_min, self.config.scale_max
        for scale in self.task_scale.values():
            scale.clamp_(math.log(low) if low > 0 else None, math.log(high or math.inf))
        if self.config.scale == "log":
            bounds = [math.log(bound) if bound > 0 else None for bound in (low, high)]
        else:
            bounds = [1 / bound if bound > 0 else None for bound in (high, low)]
        if bounds != [None, None] and self.config.scale != "none":
            self.scale.clamp_(*bounds)

    def encode_image(
        self,
        images: Tensor | Regions,
        keep_ids: Tensor | None = None,
        *,
        seed: int = 0,
        embed: bool = True,
    ) -> ImageOutput:
        """Image tower and its projection.

        Args:
            images (B, S, S, 3): uint8, S = config.image_size; or what a detector saw in B images,
                where `config.vision.front` is "regions".
            keep_ids (B, K): int64 ascending ids of the patches to embed; None keeps all.
            seed: keys dropout in training.
            embed: whether to place them in the joint space, where there is one.
        """
        side, wants_regions = self.config.image_size, self.config.vision.front == "regions"
        if isinstance(images, Regions) != wants_regions:
            raise TypeError(
                f"preset {self.config.preset!r} reads {'regions' if wants_regions else 'pixels'}, "
                f"got {type(images).__name__}"
            )
        if not wants_regions and images.shape[1:] != (side, side, 3):
            raise ValueError(f"images must be (B, {side}, {side}, 3), got {tuple(images.shape)}")
        tokens = self.vision(images, keep_ids, seed)
        if not (self.has_joint_space and embed):
            return ImageOutput(tokens, None)
        if self.config.shared:
            return ImageOutput(tokens, self.fusion.encode_image(tokens, fold_seed(seed, 1)))
        pooled = self.vision.pool(tokens)
        if self.config.vision.unit_features:
            pooled = _unit(pooled).to(pooled.dtype)
        return ImageOutput(tokens, _unit(self.image_projection(pooled)))

    def encode_text(self, text: Ragged, *, seed: int = 0, embed: bool = True) -> TextOutput:
        """Text tower and its projection; `embed` as in `encode_image`.

        `text` packs int64 token ids with their start and end tokens.
        """
        tokens = self.text(text, seed)
        if self.config.text.pool == "appended":
            last = tokens.values[tokens.last()]
            embedding = _unit(self.text_projection(last)) if embed else None
            return TextOutput(tokens.without_last(), embedding)
        if not (self.has_joint_space and embed):
            return TextOutput(tokens, None)
        if self.config.shared:
            return TextOutput(tokens, self.fusion.encode_text(tokens, fold_seed(seed, 1)))
        pooled = tokens.values[text.first() if self.config.text.pool == "first" else text.last()]
        return TextOutput(tokens, _unit(self.text_projection(pooled)))

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
        return self.fuse_pairs(text_tokens, keys, kv_index, seed=seed).text

    def fuse_pairs(
        self, text_tokens: Ragged, keys: ImageKeys | Ragged, kv_index: Tensor, *, seed: int = 0
    ) -> FusedOutput:
        """`fuse` with the fused image tokens too."""
        self._need(self.fusion, "a fusion tower")
        return self.fusion(text_tokens, keys, kv_index, seed)

    def decode(
        self,
        text: Ragged,
        keys: ImageKeys,
        kv_index: Tensor,
        *,
        prompt: Ragged | None = None,
        tokens: Ragged | None = None,
        cache: KeyCache | None = None,
        seed: int = 0,
    ) -> Ragged:
        """Packed states (T, D), each of which predicts the token after its own: it has seen the
        text up to itself, and its image.

        Args:
            text: packed token ids of R texts, or with a `cache` what follows the tokens in it.
            keys: `image_keys` of the images.
            kv_index (R,): int64, the image each text reads.
            prompt: packed token ids of R texts that come before; all that follow see them whole,
                and they see themselves both ways (MetaLM; not where fusion is "cross").
            tokens: `encode_text(text).tokens` where it has run already.
            cache: keys of the tokens so far, of R texts; the caller advances it.
            seed: keys dropout in training.
        """
        if "a text decoder" not in self.config.parts:
            raise ValueError(missing(self.config.preset, "a text decoder"))
        if self.config.fusion.kind != "cross":
            return decode_in_sequence(
                self.text, self.fusion, text, keys, kv_index, prompt, tokens, cache, seed
            )
        if prompt is not None:
            raise ValueError(f"preset {self.config.preset!r} writes captions: it takes no prompt")
        if cache is not None:
            tokens = self.text(text, seed, cache)
        elif tokens is None:
            tokens = self.encode_text(text, seed=seed).tokens
        return self.fusion(tokens, keys, kv_index, seed, cache).text

    def lm_head_inputs(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of states (n, D) of `decode`, what `ops.linear_cross_entropy` takes: states, vocabulary
        weight (V, D), bias (V,) or None.
        """
        if self.config.shared:
            return self.token_head_inputs(hidden, "lm")
        self._need(self.lm_head, "a text decoder")
        return hidden, self.lm_head.weight, None

    def next_token_logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits (n, V) of states (n, D) of `decode`."""
        return _full(F.linear(*self.lm_head_inputs(hidden)))

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

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits (n, V) of hidden states (n, D)."""
        return _full(F.linear(*self.token_head_inputs(hidden)))

    def token_head_inputs(
        self, hidden: Tensor, task: str = "mlm"
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Transformed hidden states (n, D), vocabulary weight (V, D) and bias (V,) or None: what
        `ops.linear_cross_entropy` takes.

        Of a shared encoder they are features (n, E) times the multiplier of objective `task`, and
        the features (V, E) of the words, encoded at each call.
        """
        if self.config.shared:
            return self.scale_of(task) * self.fusion.features(hidden), self.encode_words(), None
        self._need(self.token_head, "a token head")
        return self.token_head(hidden), self.text.embedding.token, self.token_head.bias

    def encode_words(self) -> Tensor:
        """Features (V, E) of the vocabulary's words, each a text of its own (Uni-Perceiver)."""
        words = torch.arange(self.config.text.vocab_size, device=self.device)
        # The first of the two is a start token, whichever it is.
        text = Ragged.from_dense(torch.stack([words.new_zeros(len(words)), words], 1))
        return self.fusion.encode_text(self.text(text), kind=Kind.WORD)

    def _need(self, part: nn.Module | Tensor | None, what: str) -> None:
        if part is None:
            raise ValueError(missing(self.config.preset, what))


def _fusion_tower(config: ModelConfig) -> FusionTower | ConcatTower | None:
    fusion = config.fusion
    if not fusion.depth:
        return None
    if fusion.kind == "shared":
        return SharedTower(fusion, config.embed_dim)
    if fusion.kind == "prefix":
        return PrefixTower(fusion, config.vision.dim)
    if fusion.kind == "concat":
        return ConcatTower(fusion)
    return FusionTower(fusion, config.vision.dim)


def _projection(config: ModelConfig, width: int, wanted: bool) -> nn.Module | None:
    """Into the joint space: None where the model has none or its one encoder projects, the identity
    where it is the tower's.
    """
    if not config.embed_dim or config.shared:
        return None
    return nn.Linear(width, config.embed_dim, config.projection_bias) if wanted else nn.Identity()


def create_model(preset: str, size: str = "tiny", **overrides) -> VLPModel:
    """A freshly initialised model; arguments as `preset_config`.

    Example: `create_model("albef", size="tiny", vocab_size=4096, image_size=64)`.
    """
    return VLPModel(preset_config(preset, size, **overrides))
