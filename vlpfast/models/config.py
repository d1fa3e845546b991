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
    """A vision transformer over patches, a CNN's grid or detected regions, where depth 0 is the
    front end alone; or a CNN whose pooled features are all there is.

    Attributes:
        front: what makes the tokens: "patches" (square ones), "grid" (the cells of a CNN's last
            feature map, projected), "regions" (an object detector's), or "cnn", the CNN alone:
            `depth` is 0 and `dim` its width.
        patch_size: side of a patch, or of the square that a cell of the grid stands for, pixels.
        patch_bias: whether the patch projection has a bias.
        cnn: the network of "grid" and "cnn": "small", "resnet50", or a name of timm's.
        region_dim, region_classes: width of the regions' features, and classes of their detector.
        embed_norm: LayerNorm between the embeddings and the first block (CLIP's `pre_layrnorm`).
        position: "learned", or fixed 2-D "sincos" (FLIP, MAE).
        class_token: whether a learned token stands before the patches (SigLIP has none).
        pool: "first" takes the class token, "mean" averages all tokens (FLIP), "map" lets a learned
            query attend to them (SigLIP), "cascade" lets `num_queries` learned queries attend to
            them, which are then the image's tokens, and one more query to those (CoCa). Of a CNN,
            "mean" pools the last feature map (ALIGN) and "first" takes the vector that its
            classifier reads (VSE++).
        num_queries: of pool "cascade".
        unit_features: L2-normalise the pooled features before they are projected (VSE++).
        patch_dropout: share of patches dropped in training, before they are embedded (FLIP).
        patch_dropout_steps: optimizer steps for which they are; 0 is all. What follows is FLIP's
            unmasked tuning: evaluation sees whole images.
        max_patches: of more patches or cells than this, training sees as many, drawn at random
            (ViLT, Pixel-BERT); 0 is no limit.
        keep_multiple: where patches are dropped, the tokens that stay, class token included, are
            this many times a number: tiles of a kernel are then full.
    """

    front: Literal["patches", "grid", "regions", "cnn"] = "patches"
    patch_size: int = 16
    patch_bias: bool = True
    embed_norm: bool = False
    position: Literal["learned", "sincos"] = "learned"
    class_token: bool = True
    pool: Literal["first", "mean", "map", "cascade"] = "first"
    unit_features: bool = False
    patch_dropout: float = 0.0
    patch_dropout_steps: int = 0
    max_patches: int = 0
    keep_multiple: int = 1
    cnn: str = "small"
    region_dim: int = 0
    region_classes: int = 0
    num_queries: int = 0

    def num_kept(self, num_patches: int) -> int:
        """Of `num_patches`, how many a training step sees."""
        kept = max(1, round(num_patches * (1 - self.patch_dropout)))
        kept = min(kept, self.max_patches or kept)
        if kept == num_patches or self.keep_multiple == 1:
            return kept
        first, multiple = int(self.front == "patches" and self.class_token), self.keep_multiple
        most = first + min(num_patches, self.max_patches or num_patches)
        tokens = max(1, round((kept + first) / multiple)) * multiple
        return min(tokens, most // multiple * multiple or most) - first


@dataclass(frozen=True)
class TextConfig(StackConfig):
    """A text transformer, or a recurrent network, over packed token ids.

    Attributes:
        kind: "transformer", or "gru": `depth` layers of gated recurrent units of width `dim` over
            word vectors of width `word_dim` (VSE++).
        vocab_size: rows of the token table.
        context_length: longest sequence, tokens.
        causal: each token sees itself and earlier ones only (CLIP).
        pool: "first" takes the start token, "last" the end token; "appended" a learned class token
            after it, whose position is the table's last whatever the text's length, and fusion then
            reads the others before the last norm (CoCa).
        embed_norm: LayerNorm after the embeddings (BERT).
        token_types: rows of the token-type table; text uses row 0 (BERT has 2, CLIP none).
    """

    kind: Literal["transformer", "gru"] = "transformer"
    word_dim: int = 0
    vocab_size: int = 4096
    context_length: int = 77
    causal: bool = False
    pool: Literal["first", "last", "appended"] = "last"
    embed_norm: bool = False
    token_types: int = 0


@dataclass(frozen=True)
class FusionConfig(StackConfig):
    """Where texts and images meet.

    Attributes:
        kind: "cross", text blocks that read images by cross-attention (ALBEF); "concat", blocks
            over text and image tokens in one sequence (UNITER, ViLT); or "shared", such blocks that
            encode images alone and texts alone too, into the joint space, and the words that are
            predicted (Uni-Perceiver); "prefix", a causal decoder of text after the image tower's
            tokens, which a linear connector brings into its sequence (MetaLM).
        modality_types: a learned vector is added to each text token, another to each image token.
        pooler: the matching head reads tanh(linear(first token)) (BERT).
        moe_experts: of every second block from the first, experts in MLP and self-attention, of
            which a kind of tokens is given `moe_top_k` by its attributes; 0: none. "shared" only.
        causal: each text token sees itself and earlier ones only, and the image: fusion then
            decodes and has no matching head ("cross", CoCa; "prefix" must be).
        key_norm: a LayerNorm for each layer before images' keys and values (open_clip's CoCa).
        mlp_between: an MLP before cross-attention too (open_clip's CoCa).
    """

    kind: Literal["cross", "concat", "shared", "prefix"] = "cross"
    modality_types: bool = False
    pooler: bool = False
    moe_experts: int = 0
    moe_top_k: int = 2
    causal: bool = False
    key_norm: bool = False
    mlp_between: bool = False


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
        mlm_head: whether the model predicts tokens (BERT's transform with the token table tied).
        lm_head: what predicts the next token of a text that is decoded: "linear" is a vocabulary
            weight of its own (CoCa); "none": the model writes no text.
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
    lm_head: Literal["none", "linear"] = "none"
    region_heads: bool = False
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
        if self.vision.front in ("patches", "grid") and self.image_size % self.vision.patch_size:
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
        if self.in_sequence and self.fusion.kind != "prefix" and self.vision.dim != self.text.dim:
            raise ValueError(
                f"vision.dim must equal text.dim {self.text.dim} where they share a sequence, "
                f"got {self.vision.dim}"
            )
        if self.fusion.kind == "prefix":
            if not self.fusion.causal or self.text.depth:
                raise ValueError(
                    "fusion.kind 'prefix' is the decoder: fusion.causal must be True, text.depth "
                    f"must be 0, got {self.fusion.causal} and {self.text.depth}"
                )
        elif self.fusion.causal and (self.fusion.kind != "cross" or not self.text.causal):
            raise ValueError(
                "fusion.causal needs fusion.kind 'cross' and text.causal True: what decodes must "
                f"not see later words, got {self.fusion.kind!r} and {self.text.causal}"
            )
        if (self.lm_head != "none") != self.fusion.causal:
            raise ValueError(
                f"lm_head goes with fusion.causal, got {self.lm_head!r} and {self.fusion.causal}"
            )
        if self.region_heads and self.vision.front != "regions":
            raise ValueError(
                f"region_heads needs vision.front 'regions', got {self.vision.front!r}"
            )
        for name in ("image", "text"):
            dim = (self.vision if name == "image" else self.text).dim
            if self.embed_dim and not getattr(self, f"{name}_projection") and dim != self.embed_dim:
                raise ValueError(
                    f"embed_dim must be the {name} tower's width {dim}, which is not projected, "
                    f"got {self.embed_dim}"
                )
        self._check_vision()
        self._check_text()
        self._check_shared()

    def _check_vision(self) -> None:
        vision = self.vision
        if vision.keep_multiple < 1:
            raise ValueError(f"vision.keep_multiple must be >= 1, got {vision.keep_multiple}")
        if vision.front == "cnn" and (vision.pool in ("map", "cascade") or vision.patch_dropout):
            raise ValueError(
                "vision.pool 'map' and 'cascade' and vision.patch_dropout are for patches, not for "
                "vision.front 'cnn'"
            )
        if (vision.pool == "cascade") != (vision.num_queries > 0):
            raise ValueError(
                "vision.num_queries must be > 0 with vision.pool 'cascade', and 0 with others, got "
                f"{vision.num_queries}"
            )
        if vision.front == "patches" and vision.pool == "first" and not vision.class_token:
            raise ValueError("vision.pool 'first' takes the class token: set vision.class_token")
        own = vision.cnn in ("small", "resnet50")
        if vision.front == "cnn" and own and vision.pool != "mean":
            raise ValueError(
                f"vision.pool of cnn {vision.cnn!r}, which has no classifier, must be 'mean', "
                f"got {vision.pool!r}"
            )

    def _check_text(self) -> None:
        text = self.text
        if text.kind == "gru" and text.word_dim < 1:
            raise ValueError(f"text.word_dim of kind 'gru' must be > 0, got {text.word_dim}")
        if text.kind == "gru" and (self.mlm_head or self.fusion.depth):
            raise ValueError(
                "text.kind 'gru' has neither fusion nor a token head: its states see earlier words "
                "only, and its words are narrower than its states"
            )

    def _check_shared(self) -> None:
        """What one encoder of everything excludes."""
        if not self.shared:
            if self.fusion.moe_experts:
                raise ValueError(
                    "fusion.moe_experts routes kinds of tokens: fusion.kind must be 'shared', "
                    f"got {self.fusion.kind!r}"
                )
            return
        if self.vision.depth or self.text.depth or not self.embed_dim or self.mlm_head:
            raise ValueError(
                "fusion.kind 'shared' is the only stack, with a joint space whose words are "
                "encoded: vision.depth and text.depth must be 0, embed_dim > 0, mlm_head False"
            )
        if self.vision.front != "patches" or self.vision.class_token:
            raise ValueError(
                "fusion.kind 'shared' reads patches without a class token: it has one for all"
            )

    @property
    def in_sequence(self) -> bool:
        """Whether texts and images are tokens of the same sequences."""
        return self.fusion.depth > 0 and self.fusion.kind != "cross"

    @property
    def shared(self) -> bool:
        """Whether one stack encodes images, texts and both."""
        return self.fusion.depth > 0 and self.fusion.kind == "shared"

    @property
    def parts(self) -> tuple[str, ...]:
        """What an objective may need and the model has, in the words of errors."""
        has = {
            "a joint space": self.embed_dim > 0,
            "a learned scale": self.embed_dim > 0 and self.scale != "none",
            "a learned bias": self.logit_bias,
            "a fusion tower": self.fusion.depth > 0 and not self.fusion.causal,
            "a matching head": self.fusion.depth > 0 and not (self.fusion.causal or self.shared),
            "a text decoder": self.lm_head != "none" or self.shared,
            "fused image tokens": self.in_sequence and not self.fusion.causal,
            "a token head": self.mlm_head or self.shared,
            "region heads": self.region_heads,
        }
        return tuple(part for part, present in has.items() if present)

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.vision.patch_size) ** 2
