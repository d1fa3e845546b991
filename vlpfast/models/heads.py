"""What a model predicts from its states: matching, words, regions, codes; and the scale of its
similarities.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.layers.block import ResidualNorm
from vlpfast.layers.region import REGION_HEADS
from vlpfast.models.config import FusionConfig, ModelConfig
from vlpfast.models.outputs import FusedOutput
from vlpfast.models.presets import missing
from vlpfast.models.tokenizer import CellTokenizer, VisualTokenizer
from vlpfast.ragged import Ragged


def full(x: Tensor) -> Tensor:
    """At least fp32: what leaves the model enters softmaxes and norms."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor) -> Tensor:
    """At least fp32, L2-normalised along the last dimension."""
    return F.normalize(full(x), dim=-1)


class TokenHead(nn.Module):
    """What predicts tokens: BERT's transform (Linear, GELU, LayerNorm) where `transform`, then the
    vocabulary, whose weight is the token table itself where `tied`; with a `bias` of each word.
    """

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        norm_eps: float,
        *,
        transform: bool = True,
        tied: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim) if transform else None
        self.norm = ResidualNorm(dim, norm_eps) if transform else None
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, dim))
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        """The transform alone."""
        return hidden if self.dense is None else self.norm(F.gelu(self.dense(hidden)))[0]


class AnswerHead(nn.Module):
    """Which of the data's answers is a question's: Linear to twice the width, GELU, LayerNorm,
    Linear; of a question about several images, what is pooled with each stands side by side.

    Source: airsplay/lxmert src/lxrt/modeling.py `BertVisualAnswerHead`, and UNITER's head;
    dandelin/ViLT vilt/modules/vilt_module.py, `nlvr2_classifier`, for two images. Deviation: ViLT
    and BEiT-3 normalise before GELU.
    """

    def __init__(self, dim: int, num_images: int, num_answers: int, norm_eps: float) -> None:
        super().__init__()
        self.num_images = num_images
        self.dense = nn.Linear(num_images * dim, 2 * dim)
        self.norm = ResidualNorm(2 * dim, norm_eps)
        self.answers = nn.Linear(2 * dim, num_answers)

    def forward(self, pooled: Tensor) -> Tensor:
        """(num_images * n, dim), all questions' first images first, -> (n, num_answers)."""
        pooled = pooled.unflatten(0, (self.num_images, -1)).transpose(0, 1).flatten(1)
        return self.answers(self.norm(F.gelu(self.dense(pooled)))[0])


class JointHeads(nn.Module):
    """The second pair of projections into a joint space, and its scale (VLMo)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.image = nn.Linear(config.fusion.dim, config.embed_dim, config.projection_bias)
        self.text = nn.Linear(config.fusion.dim, config.embed_dim, config.projection_bias)
        self.scale = nn.Parameter(torch.tensor(math.log(config.scale_init)))


class Heads(nn.Module):
    """The heads of `VLPModel`, which adds towers and calls `make_heads` and `init_heads`."""

    config: ModelConfig

    def make_heads(self) -> None:
        """Makes the heads that the configuration has; the others are None."""
        config = self.config
        vision, text, fusion = config.vision, config.text, config.fusion
        self.image_projection = _projection(config, vision.dim, config.image_projection)
        self.text_projection = _projection(config, text.dim, config.text_projection)
        self.joint_heads = JointHeads(config) if config.joint_embedding else None
        self.pooler, self.image_pooler, width = _poolers(fusion, vision.dim)
        matches = fusion.depth and config.match_head
        self.match_head = nn.Linear(width, 2) if matches else None
        self.lm_head = None
        if config.lm_head == "linear":
            self.lm_head = nn.Linear(fusion.dim, text.num_ids, bias=False)
        elif config.lm_head != "none":
            own = config.lm_head == "tied"
            self.lm_head = TokenHead(text.dim, text.num_ids, text.norm_eps, transform=own, bias=own)
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
        known = vision.region_attributes
        attributes = {"num_attributes": known} if known else {}
        self.region_heads = (
            REGION_HEADS[vision.region_kind](
                vision.dim, vision.region_dim, vision.region_classes, fusion.norm_eps, **attributes
            )
            if config.region_heads
            else None
        )
        self.answer_head = (
            AnswerHead(width, config.answer_images, config.answers, fusion.norm_eps)
            if config.answers
            else None
        )
        self.code_head = None
        if config.codes and config.code_transform:
            self.code_head = TokenHead(vision.dim, config.codes, vision.norm_eps, tied=False)
        elif config.codes:
            self.code_head = nn.Linear(vision.dim, config.codes)
        # 256 values of each of three channels.
        self.color_head = nn.Linear(vision.dim, 3 * 256) if config.color_head else None
        self.tokenizer = _tokenizer(config)
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

    @property
    def trained_parts(self) -> dict[str, nn.Module | None]:
        """Of `ModelConfig.parts`, those that only objectives which need them train."""
        return {
            "a joint space": self.image_projection,
            "a matching head": self.match_head,
            "a text decoder": self.lm_head,
            "a token head": self.token_head,
            "region heads": self.region_heads,
            "an attribute head": getattr(self.region_heads, "attributes", None),
            "an answer head": self.answer_head,
            "a code head": self.code_head,
            "a color head": self.color_head,
        }

    @torch.no_grad()
    def init_heads(self) -> None:
        """Draws fresh weights from torch's default generator."""
        joint = self.joint_heads
        projections = [self.image_projection, self.text_projection]
        for projection in projections + ([] if joint is None else [joint.image, joint.text]):
            if isinstance(projection, nn.Linear):
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        if self.tokenizer is not None:
            self.tokenizer.init_weights()
        heads = (
            self.match_head,
            self.token_head,
            self.pooler,
            self.image_pooler,
            self.region_heads,
            self.answer_head,
            self.code_head,
            self.lm_head,
            self.fusion.project if self.config.shared else None,
            self.color_head,
        )
        for head in (m for part in heads if part is not None for m in part.modules()):
            if isinstance(head, nn.Linear):
                nn.init.normal_(head.weight, std=0.02)
                if head.bias is not None:
                    nn.init.zeros_(head.bias)
            elif isinstance(head, TokenHead) and head.weight is not None:
                nn.init.normal_(head.weight, std=0.02)

    @property
    def logit_scale(self) -> Tensor:
        """0-d multiplier of the cosine similarities."""
        self._need("a joint space")
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
            if self.joint_heads is not None:
                self.joint_heads.scale.clamp_(*bounds)

    def match(self, fused: Ragged | FusedOutput, rows: int | None = None) -> Tensor:
        """Image-text matching logits (R, 2) from `first_tokens` of each row (or of the first
        `rows`); index 1 says "they match".
        """
        return self.match_logits(*self.first_tokens(fused, rows))

    def first_tokens(
        self, fused: Ragged | FusedOutput, rows: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What heads of pairs read of each fused row (or of the first `rows`): the first text token
        (R, D), or fusion's class token; and with `fusion.pair_pooler` the first image token
        (R, D_image), else None. Models with either need both streams.
        """
        text, image = (fused, None) if isinstance(fused, Ragged) else (fused.text, fused.image)
        reads_image = self.image_pooler is not None or self.config.fusion.class_token
        if not reads_image:
            return text.values[text.first()[:rows]], None
        if image is None:
            raise ValueError(
                f"match of preset {self.config.preset!r} reads the fused image tokens too: give "
                "what fuse_pairs returns"
            )
        first_place = image.values[image.first()[:rows]]
        if self.config.fusion.class_token:
            return first_place, None
        return text.values[text.first()[:rows]], first_place

    def match_logits(self, first_tokens: Tensor, first_places: Tensor | None = None) -> Tensor:
        """`match` on first tokens (R, D), and where the model pools images (R, D_image), already
        taken.
        """
        self._need("a matching head")
        return full(self.match_head(self.pool(first_tokens, first_places)))

    def pool(self, first_tokens: Tensor, first_places: Tensor | None = None) -> Tensor:
        """What heads of pairs read of first tokens (R, D): BERT's pooler where there is one;
        with `fusion.pair_pooler` the product of what is pooled of texts and of images.
        """
        if self.image_pooler is not None:
            return self.pooler(first_tokens).relu() * self.image_pooler(first_places).relu()
        return first_tokens if self.pooler is None else self.pooler(first_tokens).tanh()

    def region_features(self, hidden: Tensor) -> Tensor:
        """Features (n, region_dim) of hidden regions from their fused tokens (n, D)."""
        self._need("region heads")
        self._need("a region feature head")
        return full(self.region_heads.features(hidden, self.vision.embedding))

    def region_logits(self, hidden: Tensor) -> Tensor:
        """Class logits (n, region_classes) of hidden regions from their fused tokens (n, D); as
        LXMERT has them, one column less: there is no background.
        """
        self._need("region heads")
        return full(self.region_heads.logits(hidden))

    def attribute_logits(self, hidden: Tensor) -> Tensor:
        """Attribute logits (n, region_attributes - 1) of hidden regions from their fused tokens
        (n, D).
        """
        self._need("an attribute head")
        return full(self.region_heads.attribute_logits(hidden))

    def answer_logits(self, first_tokens: Tensor, first_places: Tensor | None = None) -> Tensor:
        """Logits (R, answers) of the answers to questions, from what `first_tokens` gives of their
        rows: pooled as for matching. With `answer_images` 2 the rows are 2R, all questions with
        their first images and then all with their second.
        """
        self._need("an answer head")
        return full(self.answer_head(self.pool(first_tokens, first_places)))

    def patches(self, tokens: Tensor) -> Tensor:
        """Of image tokens (B, N, D) those of patches, (B, P, D)."""
        return tokens[:, -self.config.num_patches :]

    def code_head_inputs(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (n, D), transformed where the head does, its weight (K, D) and bias (K,):
        what `ops.linear_cross_entropy` takes.
        """
        self._need("a code head")
        head = self.code_head
        hidden = head(hidden) if isinstance(head, TokenHead) else hidden
        return hidden, head.weight, head.bias

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., K) of codes from hidden states (..., D)."""
        return full(F.linear(*self.code_head_inputs(hidden)))

    def color_logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., 3, 256) of mean colours from hidden states (..., D)."""
        self._need("a color head")
        return full(self.color_head(hidden)).unflatten(-1, (3, 256))

    def image_codes(self, images: Tensor) -> Tensor:
        """A tokenizer's codes (B, P) int64 of images (B, S, S, 3) uint8."""
        self._need("a codebook")
        tokens = self.encode_image(images).tokens
        cells = isinstance(self.tokenizer, CellTokenizer)
        return self.tokenizer.codes(tokens if cells else self.patches(tokens))

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits (n, V) of hidden states (n, D)."""
        return full(F.linear(*self.token_head_inputs(hidden)))

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
        self._need("a token head")
        head = self.token_head
        weight = self.text.embedding.token if head.weight is None else head.weight
        return head(hidden), weight, head.bias

    def lm_head_inputs(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of states (n, D) of `decode`, what `ops.linear_cross_entropy` takes: states, vocabulary
        weight (V, D), bias (V,) or None.
        """
        if self.config.shared:
            return self.token_head_inputs(hidden, "lm")
        self._need("a text decoder")
        if isinstance(self.lm_head, TokenHead):
            return self.lm_head(hidden), self.text.embedding.token, self.lm_head.bias
        return hidden, self.lm_head.weight, None

    def next_token_logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits (n, V) of states (n, D) of `decode`."""
        return full(F.linear(*self.lm_head_inputs(hidden)))

    def _need(self, part: str) -> None:
        """Raises ValueError where the model lacks `part`, of `ModelConfig.parts`."""
        if part not in self.config.parts:
            raise ValueError(missing(self.config.preset, part))


def _poolers(
    config: FusionConfig, image_dim: int
) -> tuple[nn.Linear | None, nn.Linear | None, int]:
    """Of texts and images, and the width that the matching head reads."""
    if config.pair_pooler:
        poolers = (nn.Linear(width, image_dim) for width in (config.dim, image_dim))
        return (*poolers, image_dim)
    return nn.Linear(config.dim, config.dim) if config.pooler else None, None, config.dim


def _tokenizer(config: ModelConfig) -> VisualTokenizer | CellTokenizer | None:
    if not config.codebook.size:
        return None
    if config.codebook.kind == "kmeans":
        return CellTokenizer(config.codebook, config.num_patches)
    return VisualTokenizer(config.codebook, config.vision, config.num_patches)


def _projection(config: ModelConfig, width: int, wanted: bool) -> nn.Module | None:
    """Into the joint space: None where the model has none or its one encoder projects, the identity
    where it is the tower's.
    """
    if not config.embed_dim or config.shared:
        return None
    return nn.Linear(width, config.embed_dim, config.projection_bias) if wanted else nn.Identity()
