"""What settings of a model need of each other."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from vlpfast.models.stack_config import StackConfig
from vlpfast.rules import check_rules

if TYPE_CHECKING:
    from vlpfast.models.config import ModelConfig

_SQUARE = (
    "{vision.front must be 'patches'}, {vision.class_token True}, {vision.patch_dropout 0}, "
    "{vision.max_patches 0}"
)
# See `vlpfast.rules`.
_RULES = (
    "[vision.front 'patches' or 'grid']: {image_size must be a multiple of vision.patch_size}",
    "{vision.dim must be a multiple of vision.heads}",
    "{text.dim must be a multiple of text.heads}",
    "{fusion.dim must be a multiple of fusion.heads}",
    "{vision.drop_path_rate must be in [0, 1)}",
    "{text.drop_path_rate must be in [0, 1)}",
    "{fusion.drop_path_rate must be in [0, 1)}",
    "{fusion.drop_path_rate must be 0} for [fusion.kind 'co']",
    "{text.drop_path_rate must be 0} for [text.kind 'gru']",
    "{fusion.dim must be text.dim} where there is [fusion.depth]",
    "{vision.dim must be text.dim} where they share a sequence ([joins_tokens])",
    # Two streams that read each other.
    "settings such as [fusion.tied] are for {fusion.kind 'co'}",
    "settings such as [fusion.co_mlp] are for {fusion.kind 'co'}",
    "settings such as [fusion.pair_pooler] are for {fusion.kind 'co'}",
    "{vision.norm must be fusion.norm} for [fusion.kind 'co']",
    "{fusion.layer_scale must be 0} for [fusion.kind 'co']",
    "{vision.layer_scale must be 0} for [fusion.kind 'co']",
    "{vision.dim must be fusion.dim} where [fusion.tied] shares weights",
    # A class token of fusion, over towers that normalise after what fusion reads.
    "[fusion.class_token] needs {fusion.kind 'concat'}, {fusion.experts 'shared'} and "
    "{embed_dim > 0}",
    "[fusion.class_token] needs {vision.front 'patches'} and {vision.head_layers 0}",
    "[fusion.class_token] needs {vision.depth > 0}, {vision.norm 'pre' or 'sub'} and "
    "{vision.pool 'first'}",
    "[fusion.class_token] needs {text.depth > 0}, {text.norm 'pre' or 'sub'} and "
    "{text.pool 'first'}",
    # Decoders: none sees later words.
    "[fusion.kind 'prefix' or 'seq2seq'] is the decoder: {fusion.causal must be True} and "
    "{text.depth 0}",
    "[fusion.causal] needs {fusion.kind 'cross' or 'prefix' or 'seq2seq'}",
    "[fusion.causal] needs with [fusion.kind 'cross'] {text.causal True}",
    "lm_head goes with [fusion.causal] or decoder: {lm_head must be 'linear' or 'tied' or 'table'}",
    "lm_head goes with fusion.causal or [decoder]: {lm_head must be 'linear' or 'tied' or 'table'}",
    "lm_head goes with fusion.causal or decoder: {lm_head must be 'none'} with "
    "[fusion.causal False] and [decoder False]",
    "[decoder] needs {fusion.shares_text True}",
    "[fusion.shares_text] needs {fusion.kind 'cross'}, {fusion.causal False}, {text.causal False} "
    "and {text.task_tokens 2}",
    # Heads and joint spaces.
    "[region_heads] needs {vision.front 'regions'}",
    "[vision.region_attributes] needs {vision.region_kind 'lxmert'}",
    "{answer_images must be 1 or 2}",
    "[answers] are told from fused text and image: {fusion.depth must be > 0} and "
    "{fusion.causal False}",
    "[joint_embedding] needs {embed_dim > 0}, {fusion.joint_experts > 0} and {scale 'log'}",
    "[embed_dim] where both modalities have [one_stack] is of first states: "
    "{vision.pool must be 'first'}",
    "[embed_dim] where both modalities have [one_stack] is of first states: "
    "{text.pool must be 'first'}",
    # Experts by modality.
    "[fusion.joint_experts] needs {fusion.experts 'mome' or 'multiway'}",
    "[fusion.relative_bias] needs {fusion.experts 'mome' or 'multiway'}",
    "[fusion.order 'image'] needs {fusion.experts 'mome' or 'multiway'}",
    "[fusion.relative_bias] is of a class token and all patches of a square before the text: "
    f"{_SQUARE}, {{fusion.order 'image'}}",
    "[fusion.experts 'mome' or 'multiway'] needs {fusion.kind 'concat'} and "
    "{fusion.norm 'pre' or 'sub'}",
    # Images.
    "vision.relative_bias is for a class token and all patches of a square: with "
    f"[vision.relative_bias 'shared' or 'layer'] {_SQUARE}",
    "{vision.keep_multiple must be >= 1}",
    "vision.pool 'map' and 'cascade' and vision.patch_dropout are for patches, not for "
    "[vision.front 'cnn']: {vision.pool must be 'first' or 'mean'} and {vision.patch_dropout 0}",
    "[vision.pool 'cascade'] needs {vision.num_queries > 0}",
    "[vision.num_queries] needs {vision.pool 'cascade'}",
    "[vision.front 'patches'] with [vision.pool 'first'] takes the class token: set "
    "{vision.class_token True}",
    "[vision.front 'cnn'] with [vision.cnn 'small']: {vision.pool of cnn 'small', which has no "
    "classifier, must be 'mean'}",
    "[vision.front 'cnn'] with [vision.cnn 'resnet50']: {vision.pool of cnn 'resnet50', which has "
    "no classifier, must be 'mean'}",
    # Texts.
    "[text.image_codes] are written from a prompt without an image: "
    "{fusion.kind must be 'seq2seq'}",
    "[text.kind 'none'] is a model of images alone: {embed_dim must be 0}, {mlm_head False} and "
    "{fusion.depth 0}",
    # No token may see the class token.
    "[text.pool 'appended'] needs {text.kind 'transformer'}, {text.norm 'pre'}, {text.depth > 0} "
    "and {text.causal True}",
    "[text.kind 'gru'] is over vectors of words: {text.word_dim of kind 'gru' must be > 0}",
    "[text.kind 'gru'] has neither fusion nor a token head, as its states see earlier words only: "
    "{mlm_head must be False} and {fusion.depth 0}",
    # One encoder of everything.
    "[fusion.moe_experts] routes kinds of tokens: {fusion.kind must be 'shared'}",
    "[fusion.kind 'shared'] is the only stack, with a joint space whose words are encoded: "
    "{vision.depth must be 0}, {text.depth 0}, {embed_dim > 0} and {mlm_head False}",
    "[fusion.kind 'shared'] has one class token for all: {vision.front must be 'patches'} and "
    "{vision.class_token False}",
    "[fusion.moe_experts] has no LayerScale and no norms inside: {fusion.layer_scale must be 0} "
    "and {fusion.norm 'pre' or 'post'}",
    # Codes.
    "[codebook.size] with [codebook.kind 'kmeans'] is of a CNN's cells: "
    "{vision.front must be 'cnn'}, {vision.pool 'mean'} and {codebook.dim vision.dim}",
    "[codebook.size] with [codebook.kind 'vqkd'] is of patches: {vision.front must be 'patches'}",
    "[color_head] is of patches: {vision.front must be 'patches'}",
    "[codes] are of patches or cells: {vision.front must be 'patches' or 'grid'}",
    "[vision.head_layers] needs {codes > 0}, {vision.norm 'pre'} and "
    "{vision.early_layers between 0 and vision.depth}",
)


def check_model(model: ModelConfig) -> None:
    """Raises ValueError where two settings do not fit, naming both."""
    check_rules(model, _RULES)
    text, fusion = model.text, model.fusion
    odd = [f.name for f in fields(StackConfig) if getattr(text, f.name) != getattr(fusion, f.name)]
    if fusion.shares_text and odd:
        raise ValueError(f"fusion.shares_text: fusion and text differ in {odd}")
    for name in ("image", "text"):
        dim = (model.vision if name == "image" else model.text).dim
        if model.embed_dim and not getattr(model, f"{name}_projection") and dim != model.embed_dim:
            raise ValueError(
                f"embed_dim must be the {name} tower's width {dim}, which is not projected, "
                f"got {model.embed_dim}"
            )
