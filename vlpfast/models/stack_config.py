"""Stacks of blocks with their front ends, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_OF_BLOCKS = (
    "dim",
    "heads",
    "mlp_ratio",
    "norm",
    "norm_eps",
    "activation",
    "dropout",
    "attention_dropout",
    "layer_scale",
)


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
        drop_path_rate: probability with which training leaves a branch of the last block out for a
            sample; from 0 at the first block it rises linearly (stochastic depth).
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
    drop_path_rate: float = 0.0

    @property
    def block(self) -> dict:
        """What a block of any kind takes of it."""
        return {name: getattr(self, name) for name in _OF_BLOCKS}


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
        region_attributes: attributes that the detector tells of regions, none among them, which the
            heads of kind "lxmert" predict too; 0: none.
        embed_norm: LayerNorm between the embeddings and the first block (CLIP's `pre_layrnorm`).
        position: "learned", fixed 2-D "sincos" (FLIP, MAE), or "none" (BEiT, with relative_bias).
        position_scale: how many times as wide as other stacks' learned positions begin.
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
    position_scale: float = 1.0
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
    region_attributes: int = 0

    @property
    def region_offset(self) -> int:
        """Tokens that stand before an image's regions."""
        return int(self.front == "regions" and self.region_kind == "vilbert")

    @property
    def num_first(self) -> int:
        """Tokens that stand before an image's patches or cells."""
        return int(self.front == "patches" and self.class_token)

    def num_kept(self, num_patches: int) -> int:
        """Of `num_patches`, how many a training step sees."""
        kept = max(1, round(num_patches * (1 - self.patch_dropout)))
        kept = min(kept, self.max_patches or kept)
        if kept == num_patches or self.keep_multiple == 1:
            return kept
        first, multiple = self.num_first, self.keep_multiple
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
        image_codes: further rows of the token table, behind `vocab_size`: codes of image patches,
            which are read and written as words are (Unified-IO); training sets it to the
            tokenizer's.
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
    image_codes: int = 0

    @property
    def num_ids(self) -> int:
        """Rows of the token table."""
        return self.vocab_size + self.image_codes

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
            predicted (Uni-Perceiver); "prefix", a causal decoder of text after the image tower's
            tokens, which a linear connector brings into its sequence (MetaLM); or "seq2seq",
            `depth` blocks that encode a prompt with those tokens, and as many of a causal decoder
            that reads them by cross-attention (PaLI). Of "seq2seq", an image stack without blocks
            and as wide as this has no connector (Unified-IO).
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
            decodes and has no matching head ("cross", CoCa; "prefix" and "seq2seq" must be).
        shares_text: the blocks are the text tower's own with cross-attention added, and read
            embedded tokens from a task token on (BLIP).
        class_token: of "concat" over towers, a learned token stands in the sequence too, which the
            matching head reads, and a linear map each brings there what the towers give before
            their last norms (FLAVA).
        key_norm: a LayerNorm for each layer before images' keys and values (open_clip's CoCa).
        mlp_between: an MLP before cross-attention too (open_clip's CoCa).
        moe_experts: of every second block from the first, experts in MLP and self-attention, of
            which a kind of tokens is given `moe_top_k` by its attributes; 0: none. "shared" only.
    """

    kind: Literal["cross", "concat", "co", "shared", "prefix", "seq2seq"] = "cross"
    modality_types: bool = False
    pooler: bool = False
    experts: Literal["shared", "mome", "multiway"] = "shared"
    joint_experts: int = 0
    order: Literal["text", "image"] = "text"
    relative_bias: bool = False
    key_bias: bool = True
    causal: bool = False
    shares_text: bool = False
    class_token: bool = False
    key_norm: bool = False
    mlp_between: bool = False
    moe_experts: int = 0
    moe_top_k: int = 2
    tied: bool = False
    co_mlp: bool = False
    pair_pooler: bool = False


@dataclass(frozen=True)
class CodebookConfig:
    """A visual tokenizer on the vision tower.

    Attributes:
        kind: "vqkd" learns codes that a decoder turns into a teacher's features (BEiT v2); "kmeans"
            has centres of the features of a CNN's cells, of their width (X-LXMERT): `decay` is
            then that of their counts, 1 for features that stay.
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
    kind: Literal["vqkd", "kmeans"] = "vqkd"
