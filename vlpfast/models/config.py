"""What a model is made of: three stacks of blocks, their front ends, and the heads.

Plain data; `presets.py` fills it in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class StackConfig:
    """A stack of transformer blocks.

    Attributes:
        dim, depth, heads: width, number of blocks (0: the stack is absent), attention heads.
        mlp_ratio: hidden width of the MLP over `dim`.
        norm: "pre" normalises before each branch (ViT, CLIP), "post" after each residual sum
            (BERT).
        norm_eps: epsilon of every LayerNorm of the stack.
        activation: "gelu" (exact) or "quick_gelu", x * sigmoid(1.702 x) (OpenAI's CLIP).
        dropout: probability after embeddings, attention projections and MLPs; `attention_dropout`
            on attention weights.
    """

    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    norm: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-6
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0


@dataclass(frozen=True)
class VisionConfig(StackConfig):
    """A vision transformer over patches, a CNN's grid or detected regions; depth 0 is the front
    end alone.

    Attributes:
        front: what makes the tokens: "patches" (a class token, then square patches), "grid" (the
            cells of a CNN's last feature map) or "regions" (an object detector's).
        patch_size: side of a patch, or of the square that a cell of the grid stands for, pixels.
        patch_bias: whether the patch projection has a bias.
        grid_cnn: the network behind a grid: "small" or "resnet50".
        region_dim, region_classes: width of the regions' features, and classes of their detector.
        embed_norm: LayerNorm between the embeddings and the first block (CLIP's `pre_layrnorm`).
        position: "learned", or fixed 2-D "sincos" (FLIP, MAE).
        pool: "first" takes the class token, "mean" averages all tokens (FLIP).
        patch_dropout: share of patches dropped in training, before they are embedded (FLIP).
        patch_dropout_steps: optimizer steps for which they are; 0 is all. What follows is FLIP's
            unmasked tuning: evaluation sees whole images.
        max_patches: of more patches or cells than this, training sees as many, drawn at random
            (ViLT, Pixel-BERT); 0 is no limit.
    """

    front: Literal["patches", "grid", "regions"] = "patches"
    patch_size: int = 16
    patch_bias: bool = True
    embed_norm: bool = False
    position: Literal["learned", "sincos"] = "learned"
    pool: Literal["first", "mean"] = "first"
    patch_dropout: float = 0.0
    patch_dropout_steps: int = 0
    max_patches: int = 0
    grid_cnn: Literal["small", "resnet50"] = "small"
    region_dim: int = 0
    region_classes: int = 0

    def num_kept(self, num_patches: int) -> int:
        """Of `num_patches`, how many a training step sees."""
        kept = max(1, round(num_patches * (1 - self.patch_dropout)))
        return min(kept, self.max_patches or kept)


@dataclass(frozen=True)
class TextConfig(StackConfig):
    """A text transformer over packed token ids.

    Attributes:
        vocab_size: rows of the token table.
        context_length: longest sequence, tokens.
        causal: each token sees itself and earlier ones only (CLIP).
        pool: "first" takes the start token, "last" the end token.
        embed_norm: LayerNorm after the embeddings (BERT).
        token_types: rows of the token-type table; text uses row 0 (BERT has 2, CLIP none).
    """

    vocab_size: int = 4096
    context_length: int = 77
    causal: bool = False
    pool: Literal["first", "last"] = "last"
    embed_norm: bool = False
    token_types: int = 0


@dataclass(frozen=True)
class FusionConfig(StackConfig):
    """Where texts and images meet.

    Attributes:
        kind: "cross", text blocks that read images by cross-attention (ALBEF); or "concat", blocks
            over text and image tokens in one sequence (UNITER, ViLT).
        modality_types: a learned vector is added to each text token, another to each image token.
        pooler: the matching head reads tanh(linear(first token)) (BERT).
    """

    kind: Literal["cross", "concat"] = "cross"
    modality_types: bool = False
    pooler: bool = False


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
        scale: "log" learns log(scale) (CLIP), "temperature" learns 1 / scale (ALBEF).
        scale_init, scale_min, scale_max: of the multiplier of the cosine similarities.
        vision, text, fusion: the stacks; `fusion.depth` 0 is a dual-tower model.
        mlm_head: whether the model predicts tokens (BERT's transform with the token table tied).
        region_heads: whether it predicts hidden regions' features and classes (UNITER).
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
    region_heads: bool = False
    projection_bias: bool = False
    scale: Literal["log", "temperature"] = "log"
    scale_init: float = 1 / 0.07
    scale_min: float = 0.0
    scale_max: float = 100.0
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        if self.vision.front != "regions" and self.image_size % self.vision.patch_size:
            raise ValueError(
                f"image_size must be a multiple of vision.patch_size {self.vision.patch_size}, "
                f"got {self.image_size}"
            )
        for name in ("vision", "text", "fusion"):
            stack = getattr(self, name)
            if stack.dim % stack.heads:
                raise ValueError(
                    f"{name}.dim must be a multiple of {name}.heads {stack.heads}, got {stack.dim}"
                )
        if self.fusion.depth and self.fusion.dim != self.text.dim:
            raise ValueError(
                f"fusion.dim must equal text.dim {self.text.dim}, got {self.fusion.dim}"
            )
        if self.fusion.depth and self.fusion.kind == "concat" and self.vision.dim != self.text.dim:
            raise ValueError(
                f"vision.dim must equal text.dim {self.text.dim} where they share a sequence, "
                f"got {self.vision.dim}"
            )
        if self.region_heads and self.vision.front != "regions":
            raise ValueError(
                f"region_heads needs vision.front 'regions', got {self.vision.front!r}"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """What an objective may need and the model has, in the words of errors."""
        has = {
            "a joint space": self.embed_dim > 0,
            "a fusion tower": self.fusion.depth > 0,
            "fused image tokens": self.fusion.depth > 0 and self.fusion.kind == "concat",
            "a token head": self.mlm_head,
            "region heads": self.region_heads,
        }
        return tuple(part for part, present in has.items() if present)

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.vision.patch_size) ** 2
