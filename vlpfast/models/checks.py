"""What settings of a model exclude each other, and the errors that say so."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from vlpfast.models.stack_config import StackConfig

if TYPE_CHECKING:
    from vlpfast.models.config import ModelConfig


def check_model(model: ModelConfig) -> None:
    """Raises ValueError where two settings do not fit, naming both."""
    if model.vision.front in ("patches", "grid") and model.image_size % model.vision.patch_size:
        raise ValueError(
            f"image_size must be a multiple of vision.patch_size {model.vision.patch_size}, "
            f"got {model.image_size}"
        )
    for name in ("vision", "text", "fusion"):
        stack = getattr(model, name)
        if stack.dim % stack.heads:
            raise ValueError(
                f"{name}.dim must be a multiple of {name}.heads {stack.heads}, got {stack.dim}"
            )
        if not 0 <= stack.drop_path_rate < 1:
            raise ValueError(f"{name}.drop_path_rate must be in [0, 1), got {stack.drop_path_rate}")
    bare = {"fusion": model.fusion.kind == "co", "text": model.text.kind == "gru"}
    for name, holds in bare.items():
        if holds and getattr(model, name).drop_path_rate:
            kind = getattr(model, name).kind
            raise ValueError(f"{name}.drop_path_rate must be 0 for {name}.kind {kind!r}")
    if model.fusion.depth and model.fusion.dim != model.text.dim:
        raise ValueError(f"fusion.dim must equal text.dim {model.text.dim}, got {model.fusion.dim}")
    if model.joins_tokens and model.vision.dim != model.text.dim:
        raise ValueError(
            f"vision.dim must equal text.dim {model.text.dim} where they share a sequence, "
            f"got {model.vision.dim}"
        )
    _check_co(model)
    _check_class_token(model)
    if model.fusion.kind in ("prefix", "seq2seq"):
        if not model.fusion.causal or model.text.depth:
            raise ValueError(
                f"fusion.kind {model.fusion.kind!r} is the decoder: fusion.causal must be True, "
                f"text.depth must be 0, got {model.fusion.causal} and {model.text.depth}"
            )
    elif model.fusion.causal and (model.fusion.kind != "cross" or not model.text.causal):
        raise ValueError(
            "fusion.causal needs fusion.kind 'cross' and text.causal True: what decodes must "
            f"not see later words, got {model.fusion.kind!r} and {model.text.causal}"
        )
    if (model.lm_head != "none") != (model.fusion.causal or model.decoder):
        raise ValueError(
            "lm_head goes with fusion.causal or decoder, got "
            f"{model.lm_head!r}, {model.fusion.causal} and {model.decoder}"
        )
    _check_sharing(model)
    if model.region_heads and model.vision.front != "regions":
        raise ValueError(f"region_heads needs vision.front 'regions', got {model.vision.front!r}")
    if model.vision.region_attributes and model.vision.region_kind != "lxmert":
        raise ValueError(
            "vision.region_attributes needs vision.region_kind 'lxmert', "
            f"got {model.vision.region_kind!r}"
        )
    if model.answer_images not in (1, 2):
        raise ValueError(f"answer_images must be 1 or 2, got {model.answer_images}")
    if model.answers and "a fusion tower" not in model.parts:
        raise ValueError(
            "answers are told from fused text and image: fusion.depth must be > 0 and "
            f"fusion.causal False, got {model.fusion.depth} and {model.fusion.causal}"
        )
    for name in ("image", "text"):
        dim = (model.vision if name == "image" else model.text).dim
        if model.embed_dim and not getattr(model, f"{name}_projection") and dim != model.embed_dim:
            raise ValueError(
                f"embed_dim must be the {name} tower's width {dim}, which is not projected, "
                f"got {model.embed_dim}"
            )
    _check_fusion(model)
    _check_vision(model)
    _check_text(model)
    _check_shared(model)
    _check_codes(model)


def _check_fusion(model: ModelConfig) -> None:
    fusion, vision = model.fusion, model.vision
    if model.joint_embedding and not (model.embed_dim and fusion.joint_experts):
        raise ValueError("joint_embedding needs embed_dim > 0 and fusion.joint_experts > 0")
    if model.joint_embedding and model.scale != "log":
        raise ValueError(f"joint_embedding needs scale 'log', got {model.scale!r}")
    if model.one_stack and model.embed_dim and {vision.pool, model.text.pool} != {"first"}:
        raise ValueError(
            "embed_dim of a model with one stack for both modalities is of first states: "
            f"vision.pool and text.pool must be 'first', got {vision.pool!r} and "
            f"{model.text.pool!r}"
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


def _check_co(model: ModelConfig) -> None:
    fusion, vision = model.fusion, model.vision
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


def _check_class_token(model: ModelConfig) -> None:
    fusion, vision, text = model.fusion, model.vision, model.text
    if not fusion.class_token:
        return
    if fusion.kind != "concat" or fusion.experts != "shared" or not model.embed_dim:
        raise ValueError(
            "fusion.class_token needs fusion.kind 'concat', fusion.experts 'shared' and "
            f"embed_dim > 0, got {fusion.kind!r}, {fusion.experts!r} and {model.embed_dim}"
        )
    if vision.front != "patches" or vision.head_layers:
        raise ValueError(
            "fusion.class_token needs vision.front 'patches' and vision.head_layers 0, got "
            f"{vision.front!r} and {vision.head_layers}"
        )
    for name, stack in (("vision", vision), ("text", text)):
        if not stack.depth or stack.norm == "post" or stack.pool != "first":
            raise ValueError(
                "fusion.class_token is over towers that normalise after what fusion reads: "
                f"{name}.depth > 0, {name}.norm 'pre' or 'sub', {name}.pool 'first', got "
                f"{stack.depth}, {stack.norm!r} and {stack.pool!r}"
            )


def _check_sharing(model: ModelConfig) -> None:
    text, fusion = model.text, model.fusion
    if model.decoder and not fusion.shares_text:
        raise ValueError("decoder needs fusion.shares_text True, got False")
    if not fusion.shares_text:
        return
    if fusion.kind != "cross" or fusion.causal or text.causal or text.task_tokens != 2:
        raise ValueError(
            "fusion.shares_text needs fusion.kind 'cross', nothing causal and text.task_tokens "
            f"2, got {fusion.kind!r}, {fusion.causal}, {text.causal} and {text.task_tokens}"
        )
    odd = [f.name for f in fields(StackConfig) if getattr(text, f.name) != getattr(fusion, f.name)]
    if odd:
        raise ValueError(f"fusion.shares_text: fusion and text differ in {odd}")


def _check_vision(model: ModelConfig) -> None:
    vision = model.vision
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


def _check_text(model: ModelConfig) -> None:
    text = model.text
    if text.image_codes and model.fusion.kind != "seq2seq":
        raise ValueError(
            "text.image_codes are written from a prompt without an image: fusion.kind must be "
            f"'seq2seq', got {model.fusion.kind!r}"
        )
    if text.kind == "none" and (model.embed_dim or model.mlm_head or model.fusion.depth):
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
    if text.kind == "gru" and (model.mlm_head or model.fusion.depth):
        raise ValueError(
            "text.kind 'gru' has neither fusion nor a token head: its states see earlier words "
            "only, and its words are narrower than its states"
        )


def _check_codes(model: ModelConfig) -> None:
    vision = model.vision
    book = model.codebook
    if book.size and book.kind == "kmeans":
        if vision.front != "cnn" or vision.pool != "mean" or book.dim != vision.dim:
            raise ValueError(
                "codebook.kind 'kmeans' is of a CNN's cells: vision.front must be 'cnn', "
                f"vision.pool 'mean' and codebook.dim vision.dim {vision.dim}, got "
                f"{vision.front!r}, {vision.pool!r} and {book.dim}"
            )
    elif (model.color_head or book.size) and vision.front != "patches":
        raise ValueError(
            "color_head and codebook are of patches: vision.front must be 'patches', "
            f"got {vision.front!r}"
        )
    if model.codes and vision.front not in ("patches", "grid"):
        raise ValueError(
            f"codes are of patches or cells: vision.front must have them, got {vision.front!r}"
        )
    early = 0 < vision.early_layers < vision.depth
    if vision.head_layers and not (model.codes and early and vision.norm == "pre"):
        raise ValueError(
            "vision.head_layers needs codes > 0, vision.norm 'pre' and vision.early_layers "
            f"between 0 and vision.depth {vision.depth}, got codes {model.codes}, norm "
            f"{vision.norm!r}, early_layers {vision.early_layers}"
        )


def _check_shared(model: ModelConfig) -> None:
    """What one encoder of everything excludes."""
    if not model.shared:
        if model.fusion.moe_experts:
            raise ValueError(
                "fusion.moe_experts routes kinds of tokens: fusion.kind must be 'shared', "
                f"got {model.fusion.kind!r}"
            )
        return
    if model.vision.depth or model.text.depth or not model.embed_dim or model.mlm_head:
        raise ValueError(
            "fusion.kind 'shared' is the only stack, with a joint space whose words are "
            "encoded: vision.depth and text.depth must be 0, embed_dim > 0, mlm_head False"
        )
    if model.vision.front != "patches" or model.vision.class_token:
        raise ValueError(
            "fusion.kind 'shared' reads patches without a class token: it has one for all"
        )
    fusion = model.fusion
    if fusion.moe_experts and (fusion.layer_scale or fusion.norm == "sub"):
        raise ValueError(
            "fusion.moe_experts has no LayerScale and no norms inside: fusion.layer_scale must be "
            f"0 and fusion.norm 'pre' or 'post', got {fusion.layer_scale} and {fusion.norm!r}"
        )
