"""What a model is made of: three stacks of blocks, their front ends, and the heads.

Plain data; `presets.py` fills it in.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
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
            (BERT), "sub" as "pre" and once more inside of each branch, before its last projection
            (Magneto, BEiT-3).
        norm_eps: epsilon of every LayerNorm of the stack.
        activation: "gelu" (exact) or "quick_gelu", x * sigmoid(1.702 x) (OpenAI's CLIP).
        dropout: probability after embeddings, attention projections and MLPs; `attention_dropout`
            on attention weights.
        layer_scale: first value of a learned factor of each channel of each branch (LayerScale);
            0: none.
    """

    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    norm: Literal["pre", "post", "sub"] = "pre"
    norm_eps: float = 1e-6
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    layer_scale: float = 0.0


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
        region_kind: how regions are embedded and what predicts hidden ones: as "uniter" (feature
            and box normalised, then their sum), as "lxmert" (their mean, boxes of 4 numbers), or as
            "vilbert" (the sum normalised, the whole image before the regions); `layers.region`.
        embed_norm: LayerNorm between the embeddings and the first block (CLIP's `pre_layrnorm`).
        position: "learned", fixed 2-D "sincos" (FLIP, MAE), or "none" (BEiT, with relative_bias).
        relative_bias: a learned bias of attention for each head and displacement between patches
            and class token: "shared" by all layers (BEiT's pre-training), or each "layer" has its
            own; of "patches", where none are dropped.
        head_layers, early_layers: blocks of the class token's head (BEiT v2), 0: none. Of masked
            images, they read the last class token and the patches as they are after `early_layers`
            blocks: hidden patches are told from what the class token gathered.
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
    position: Literal["learned", "sincos", "none"] = "learned"
    relative_bias: Literal["none", "shared", "layer"] = "none"
    head_layers: int = 0
    early_layers: int = 0
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
    region_kind: Literal["uniter", "lxmert", "vilbert"] = "uniter"

    @property
    def region_offset(self) -> int:
        """Tokens that stand before an image's regions."""
        return int(self.front == "regions" and self.region_kind == "vilbert")

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
            word vectors of width `word_dim` (VSE++); or "none": the model reads images alone.
        vocab_size: rows of the token table.
        context_length: longest sequence, tokens.
        causal: each token sees itself and earlier ones only (CLIP).
        pool: "first" takes the start token, "last" the end token; "appended" a learned class token
            after it, whose position is the table's last whatever the text's length, and fusion then
            reads the others before the last norm (CoCa).
        embed_norm: LayerNorm after the embeddings (BERT).
        token_types: rows of the token-type table; text uses row 0 (BERT has 2, CLIP none).
        position: "learned", or "none", where the stack has a relative bias.
        task_tokens: the last so many rows of the token table are no tokens of the tokenizer: of
            two, the first stands at the start of a text that is decoded, the second of one that
            reads an image (BLIP's [DEC] and [ENC]).
    """

    kind: Literal["transformer", "gru", "none"] = "transformer"
    word_dim: int = 0
    vocab_size: int = 4096
    context_length: int = 77
    causal: bool = False
    pool: Literal["first", "last", "appended"] = "last"
    embed_norm: bool = False
    token_types: int = 0
    position: Literal["learned", "none"] = "learned"
    task_tokens: int = 0

    @property
    def task_ids(self) -> tuple[int, ...]:
        """Ids of the task tokens."""
        return tuple(range(self.vocab_size - self.task_tokens, self.vocab_size))


@dataclass(frozen=True)
class FusionConfig(StackConfig):
    """Where texts and images meet.

    Attributes:
        kind: "cross", text blocks that read images by cross-attention (ALBEF); "concat", blocks
            over text and image tokens in one sequence (UNITER, ViLT); "co", layers of two streams
            that read each other: the stack's shape is the text stream's, the image stream has that
            of the vision stack, whose width and heads co-attention has too; "shared", "concat" that
            encodes images alone and texts alone too, into the joint space, and the words that are
            predicted (Uni-Perceiver); or "prefix", a causal decoder of text after the image tower's
            tokens, which a linear connector brings into its sequence (MetaLM).
        tied: of "co", both directions of co-attention share their weights (LXMERT).
        co_mlp: of "co", each stream has an MLP between co-attention and its own block (ViLBERT).
        pair_pooler: the matching head reads relu(linear(first text token)) times relu(linear(first
            image token)) (ViLBERT).
        modality_types: a learned vector is added to each text token, another to each image token.
        pooler: the matching head reads tanh(linear(first token)) (BERT).
        experts: of "concat": "shared" serves both modalities by the same blocks; "mome" has an MLP
            for each (VLMo), "multiway" all but the attention's product (BEiT-3).
        joint_experts: the last so many layers have an MLP for both where they meet (VLMo).
        order: what is first in a sequence of a stack with experts.
        relative_bias: each layer has a learned bias of attention for each head and displacement
            between patches, between words, and from one modality to the other (VLMo); needs all
            patches of images, and order "image": a token's place is then its place in the sequence.
        key_bias: whether the projection of keys has a bias, which no softmax sees.
        causal: each text token sees itself and earlier ones only, and the image: fusion then
            decodes and has no matching head ("cross", CoCa; "prefix" must be).
        shares_text: the blocks are the text tower's own with cross-attention added, and read
            embedded tokens from a task token on (BLIP).
        key_norm: a LayerNorm for each layer before images' keys and values (open_clip's CoCa).
        mlp_between: an MLP before cross-attention too (open_clip's CoCa).
        moe_experts: of every second block from the first, experts in MLP and self-attention, of
            which a kind of tokens is given `moe_top_k` by its attributes; 0: none. "shared" only.
    """

    kind: Literal["cross", "concat", "co", "shared", "prefix"] = "cross"
    modality_types: bool = False
    pooler: bool = False
    experts: Literal["shared", "mome", "multiway"] = "shared"
    joint_experts: int = 0
    order: Literal["text", "image"] = "text"
    relative_bias: bool = False
    key_bias: bool = True
    causal: bool = False
    shares_text: bool = False
    key_norm: bool = False
    mlp_between: bool = False
    moe_experts: int = 0
    moe_top_k: int = 2
    tied: bool = False
    co_mlp: bool = False
    pair_pooler: bool = False


@dataclass(frozen=True)
class CodebookConfig:
    """A visual tokenizer on the vision tower (VQ-KD).

    Attributes:
        size, dim: number of codes (0: there is none) and their width.
        decay: of the codes' moving averages, a step.
        revive_below: a code is moved when its use falls below this part of the mean use.
        decoder_depth: blocks between codes and the teacher's features.
        target_dim: width of the features; training sets it to the teacher's.
    """

    size: int = 0
    dim: int = 32
    decay: float = 0.99
    revive_below: float = 0.01
    decoder_depth: int = 3
    target_dim: int = 512


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
            weight of its own (CoCa), "tied" BERT's transform with the token table (BLIP); "none":
            the model writes no text.
        decoder: a causal decoder beside fusion, which is fusion but for self-attention of its own
            (BLIP).
        region_heads: whether it predicts hidden regions' features and classes (UNITER).
        codes: of how many codes it predicts those of hidden patches (BEiT), 0: of none; training
            sets it to the tokenizer's.
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
    lm_head: Literal["none", "linear", "tied"] = "none"
    decoder: bool = False
    region_heads: bool = False
    codes: int = 0
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
        if self.joins_tokens and self.vision.dim != self.text.dim:
            raise ValueError(
                f"vision.dim must equal text.dim {self.text.dim} where they share a sequence, "
                f"got {self.vision.dim}"
            )
        self._check_co()
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
        if (self.lm_head != "none") != (self.fusion.causal or self.decoder):
            raise ValueError(
                "lm_head goes with fusion.causal or decoder, got "
                f"{self.lm_head!r}, {self.fusion.causal} and {self.decoder}"
            )
        self._check_sharing()
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
        self._check_fusion()
        self._check_vision()
        self._check_text()
        self._check_shared()
        self._check_codes()

    def _check_fusion(self) -> None:
        fusion, vision = self.fusion, self.vision
        if self.joint_embedding and not (self.embed_dim and fusion.joint_experts):
            raise ValueError("joint_embedding needs embed_dim > 0 and fusion.joint_experts > 0")
        if self.joint_embedding and self.scale != "log":
            raise ValueError(f"joint_embedding needs scale 'log', got {self.scale!r}")
        if self.one_stack and self.embed_dim and {vision.pool, self.text.pool} != {"first"}:
            raise ValueError(
                "embed_dim of a model with one stack for both modalities is of first states: "
                f"vision.pool and text.pool must be 'first', got {vision.pool!r} and "
                f"{self.text.pool!r}"
            )
        if fusion.experts == "shared":
            if fusion.joint_experts or fusion.relative_bias or fusion.order == "image":
                raise ValueError(
                    "fusion.joint_experts, fusion.relative_bias and fusion.order 'image' need "
                    "fusion.experts 'mome' or 'multiway', got 'shared'"
                )
            return
        drops = vision.patch_dropout or vision.max_patches or not vision.class_token
        if fusion.relative_bias and (drops or vision.front != "patches" or fusion.order != "image"):
            raise ValueError(
                "fusion.relative_bias is of a class token and all patches of a square before the "
                "text: vision.front 'patches' with class_token, without patch_dropout and "
                "max_patches, and fusion.order 'image'"
            )
        if fusion.kind != "concat" or fusion.norm == "post":
            raise ValueError(
                f"fusion.experts {fusion.experts!r} needs fusion.kind 'concat' and fusion.norm "
                f"'pre' or 'sub', got {fusion.kind!r} and {fusion.norm!r}"
            )

    def _check_co(self) -> None:
        fusion, vision = self.fusion, self.vision
        if fusion.kind != "co":
            if fusion.tied or fusion.co_mlp or fusion.pair_pooler:
                raise ValueError(
                    "fusion.tied, fusion.co_mlp and fusion.pair_pooler are for fusion.kind 'co', "
                    f"got {fusion.kind!r}"
                )
        elif fusion.norm != vision.norm:
            raise ValueError(
                f"vision.norm must be fusion.norm {fusion.norm!r} for fusion.kind 'co', "
                f"got {vision.norm!r}"
            )
        elif fusion.layer_scale or vision.layer_scale:
            raise ValueError(
                "fusion.layer_scale and vision.layer_scale must be 0 for fusion.kind 'co', got "
                f"{fusion.layer_scale} and {vision.layer_scale}"
            )
        elif fusion.tied and fusion.dim != vision.dim:
            raise ValueError(
                f"vision.dim must be fusion.dim {fusion.dim} where fusion.tied shares weights, "
                f"got {vision.dim}"
            )

    def _check_sharing(self) -> None:
        text, fusion = self.text, self.fusion
        if self.decoder and not fusion.shares_text:
            raise ValueError("decoder needs fusion.shares_text True, got False")
        if not fusion.shares_text:
            return
        if fusion.kind != "cross" or fusion.causal or text.causal or text.task_tokens != 2:
            raise ValueError(
                "fusion.shares_text needs fusion.kind 'cross', nothing causal and text.task_tokens "
                f"2, got {fusion.kind!r}, {fusion.causal}, {text.causal} and {text.task_tokens}"
            )
        odd = [
            f.name for f in fields(StackConfig) if getattr(text, f.name) != getattr(fusion, f.name)
        ]
        if odd:
            raise ValueError(f"fusion.shares_text: fusion and text differ in {odd}")

    def _check_vision(self) -> None:
        vision = self.vision
        windowed = vision.front == "patches" and vision.class_token
        if vision.relative_bias != "none" and (
            not windowed or vision.patch_dropout or vision.max_patches
        ):
            raise ValueError(
                "vision.relative_bias is for a class token and all patches of a square: "
                "vision.front 'patches' with class_token, without patch_dropout and max_patches"
            )
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
        if text.kind == "none" and (self.embed_dim or self.mlm_head or self.fusion.depth):
            raise ValueError(
                "text.kind 'none' is a model of images alone: embed_dim, mlm_head and fusion.depth "
                "must be 0"
            )
        stack = text.kind == "transformer" and text.norm == "pre" and text.depth > 0
        if text.pool == "appended" and not (stack and text.causal):
            raise ValueError(
                "text.pool 'appended' needs a causal transformer that normalises before each "
                f"branch: no token may see the class token. Got {text.kind!r}, causal "
                f"{text.causal}, norm {text.norm!r}, depth {text.depth}"
            )
        if text.kind == "gru" and text.word_dim < 1:
            raise ValueError(f"text.word_dim of kind 'gru' must be > 0, got {text.word_dim}")
        if text.kind == "gru" and (self.mlm_head or self.fusion.depth):
            raise ValueError(
                "text.kind 'gru' has neither fusion nor a token head: its states see earlier words "
                "only, and its words are narrower than its states"
            )

    def _check_codes(self) -> None:
        vision = self.vision
        if (self.hides_patches or self.codebook.size) and vision.front != "patches":
            raise ValueError(
                "codes, color_head and codebook are of patches: vision.front must be 'patches', "
                f"got {vision.front!r}"
            )
        early = 0 < vision.early_layers < vision.depth
        if vision.head_layers and not (self.codes and early and vision.norm == "pre"):
            raise ValueError(
                "vision.head_layers needs codes > 0, vision.norm 'pre' and vision.early_layers "
                f"between 0 and vision.depth {vision.depth}, got codes {self.codes}, norm "
                f"{vision.norm!r}, early_layers {vision.early_layers}"
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
            "fused image tokens": self.joins_tokens,
            "one stack for both": self.one_stack,
            "a token head": self.mlm_head or self.shared,
            "region heads": self.region_heads,
            "a region feature head": self.region_heads and self.vision.region_kind != "vilbert",
            "a background class": self.region_heads and self.vision.region_kind != "lxmert",
            "a text tower": self.text.kind != "none",
            "a code head": self.codes > 0,
            "a color head": self.color_head,
            "a codebook": self.codebook.size > 0,
        }
        return tuple(part for part, present in has.items() if present)

    @property
    def joins_tokens(self) -> bool:
        """Whether fusion has text and image tokens in one sequence."""
        return self.fusion.depth > 0 and self.fusion.kind in ("concat", "shared")

    @property
    def one_stack(self) -> bool:
        """Whether the fusion's blocks are all that texts and images go through."""
        fusion, towers = self.fusion, self.vision.depth + self.text.depth
        return fusion.depth > 0 and fusion.kind == "concat" and not towers

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.vision.patch_size) ** 2
