"""ModelConfig: a whole model, as plain data; `presets` fills it in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vlpfast.models.checks import check_model
from vlpfast.models.stack_config import (
    CodebookConfig,
    FusionConfig,
    StackConfig,
    TextConfig,
    VisionConfig,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "CodebookConfig",
    "FusionConfig",
    "ModelConfig",
    "StackConfig",
    "TextConfig",
    "VisionConfig",
]


@dataclass(frozen=True)
class ModelConfig:
    """A whole model.

    Attributes:
        preset, size: where the configuration came from.
        image_size: side of the square input image, pixels.
        embed_dim: width of the joint image-text space; 0 is a model without one, and so without
            projections and scale.
        projection_bias: whether the two projections into it have biases (ALBEF does, CLIP does
            not).
        image_projection, text_projection: whether a tower is projected at all; where it is not, its
            width is `embed_dim`.
        scale: "log" learns log(scale) (CLIP), "temperature" learns 1 / scale (ALBEF), "none" learns
            nothing: similarities are cosines (VSE++).
        scale_init, scale_min, scale_max: of the multiplier of the cosine similarities; a bound of 0
            is none.
        task_scales: objectives whose similarities have a learned multiplier of their own (as "log")
            beside the contrast's.
        logit_bias, logit_bias_init: whether a bias is added to the multiplied similarities, and its
            first value (SigLIP).
        vision, text, fusion: the stacks; `fusion.depth` 0 is a dual-tower model.
        mlm_head: whether the model predicts tokens.
        mlm_transform, mlm_tied: whether that head has BERT's transform, and whether its weight is
            the token table.
        joint_embedding: whether images and texts have a second embedding each, of the layers that
            have experts for both modalities (VLMo).
        match_head: whether a model with fusion tells pairs that match from others.
        lm_head: what predicts the next token of a text that is decoded: "linear" is a vocabulary
            weight of its own (CoCa), "tied" BERT's transform with the token table (BLIP), "table"
            the token table alone (Unified-IO); "none": the model writes no text.
        decoder: a causal decoder beside fusion, which is fusion but for self-attention of its own
            (BLIP).
        region_heads: whether it predicts hidden regions' features and classes (UNITER).
        answers: of how many answers it tells that of a question (LXMERT), 0: of none; training sets
            it to the data's.
        answer_images: how many images a question is about: 1, or 2 (NLVR2), each of which the text
            reads in a row of its own; training sets it to the data's.
        codes: of how many codes it predicts those of hidden patches (BEiT), 0: of none; training
            sets it to the tokenizer's.
        code_transform: whether the head of codes has BERT's transform (FLAVA).
        color_head: whether it predicts the mean colour of hidden patches (ViLT's MPP).
        codebook: of a model that is a tokenizer.
        image_mean, image_std: per channel, of pixels scaled to [0, 1].
    """

    preset: str
    size: str
    image_size: int
    embed_dim: int
    vision: VisionConfig
    text: TextConfig
    fusion: FusionConfig = field(default_factory=lambda: FusionConfig(dim=0, depth=0, heads=1))
    mlm_head: bool = False
    mlm_transform: bool = True
    mlm_tied: bool = True
    joint_embedding: bool = False
    match_head: bool = True
    lm_head: Literal["none", "linear", "tied", "table"] = "none"
    decoder: bool = False
    region_heads: bool = False
    answers: int = 0
    answer_images: int = 1
    codes: int = 0
    code_transform: bool = False
    color_head: bool = False
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    projection_bias: bool = False
    image_projection: bool = True
    text_projection: bool = True
    scale: Literal["log", "temperature", "none"] = "log"
    scale_init: float = 1 / 0.07
    scale_min: float = 0.0
    scale_max: float = 100.0
    task_scales: tuple[str, ...] = ()
    logit_bias: bool = False
    logit_bias_init: float = -10.0
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        check_model(self)

    @property
    def shared(self) -> bool:
        """Whether one stack encodes images, texts and both."""
        return self.fusion.depth > 0 and self.fusion.kind == "shared"

    @property
    def hides_patches(self) -> bool:
        """Whether the model has a mask token: it predicts something of hidden patches."""
        return bool(self.codes) or self.color_head

    @property
    def parts(self) -> tuple[str, ...]:
        """What an objective may need and the model has, in the words of errors."""
        has = {
            "a joint space": self.embed_dim > 0,
            "a learned scale": self.embed_dim > 0 and self.scale != "none",
            "a learned bias": self.logit_bias,
            "a fusion tower": self.fusion.depth > 0 and not self.fusion.causal,
            "a matching head": self.fusion.depth > 0 and self.match_head,
            "a text decoder": self.lm_head != "none" or self.shared,
            "a prompt encoder": self.fusion.kind == "seq2seq",
            "image codes in its vocabulary": self.text.image_codes > 0,
            "fused image tokens": self.joins_tokens,
            "image tokens that read the text": self.joins_tokens or self.fusion.kind == "co",
            "one stack for both": self.one_stack,
            "a stack that reads texts alone": self.one_stack or self._encodes_texts,
            "a token head": self.mlm_head or self.shared,
            "region heads": self.region_heads,
            "a region feature head": self.region_heads and self.vision.region_kind != "vilbert",
            "a background class": self.region_heads and self.vision.region_kind != "lxmert",
            "an attribute head": self.region_heads and self.vision.region_attributes > 0,
            "an answer head": self.answers > 0,
            "a text tower": self.text.kind != "none",
            "a code head": self.codes > 0,
            "a color head": self.color_head,
            "a codebook": self.codebook.size > 0,
            "a decoder of codes": self.codebook.size > 0 and self.codebook.kind == "vqkd",
            "k-means centres": self.codebook.size > 0 and self.codebook.kind == "kmeans",
        }
        return tuple(part for part, present in has.items() if present)

    @property
    def _encodes_texts(self) -> bool:
        """Whether a text tower gives what it makes of every word, which has seen all others."""
        text = self.text
        both_ways = text.kind == "transformer" and text.depth > 0 and not text.causal
        return both_ways and not self.fusion.shares_text

    @property
    def joins_tokens(self) -> bool:
        """Whether fusion has text and image tokens in one sequence."""
        return self.fusion.depth > 0 and self.fusion.kind in ("concat", "shared")

    @property
    def takes_prompts(self) -> bool:
        """Whether the model writes what answers a prompt."""
        return self.fusion.depth > 0 and self.fusion.kind in ("prefix", "seq2seq")

    @property
    def one_stack(self) -> bool:
        """Whether the fusion's blocks are all that texts and images go through."""
        fusion, towers = self.fusion, self.vision.depth + self.text.depth
        return fusion.depth > 0 and fusion.kind == "concat" and not towers

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.vision.patch_size) ** 2
