"""Weights of Hugging Face transformers models as vlpfast state dicts. transformers itself is not
needed to convert.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def _block(source: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One CLIP encoder layer under `prefix`."""
    out = {}
    for kind in ("weight", "bias"):
        qkv = [source[f"{prefix}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
        out[f"attention.qkv.{kind}"] = torch.cat(qkv)
        out[f"attention.out.{kind}"] = source[f"{prefix}.self_attn.out_proj.{kind}"]
        out[f"norm1.{kind}"] = source[f"{prefix}.layer_norm1.{kind}"]
        out[f"norm2.{kind}"] = source[f"{prefix}.layer_norm2.{kind}"]
        out[f"mlp.fc1.{kind}"] = source[f"{prefix}.mlp.fc1.{kind}"]
        out[f"mlp.fc2.{kind}"] = source[f"{prefix}.mlp.fc2.{kind}"]
    return out


def _bert_block(source: Mapping[str, Tensor], prefix: str, names: dict[str, str]) -> dict:
    """One BERT-like encoder layer under `prefix`; `names` says what its parts are called."""
    out = {}
    for kind in ("weight", "bias"):
        attention = f"{prefix}.{names['attention']}"
        qkv = [source[f"{attention}.{name}.{kind}"] for name in ("query", "key", "value")]
        out[f"attention.qkv.{kind}"] = torch.cat(qkv)
        for ours in ("attention.out", "norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            out[f"{ours}.{kind}"] = source[f"{prefix}.{names[ours]}.{kind}"]
    return out


def vilt_state_dict(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of preset `vilt` from transformers' `ViltModel.state_dict()`, without the heads,
    which ViltModel does not have.

    Raises:
        KeyError: `source` lacks a weight of ViltModel.
        ValueError: `source` holds weights that have no place here, named.
    """
    embeddings, text = "embeddings", "embeddings.text_embeddings"
    out = {
        "vision.embedding.weight": source[f"{embeddings}.patch_embeddings.projection.weight"],
        "vision.embedding.bias": source[f"{embeddings}.patch_embeddings.projection.bias"],
        "vision.embedding.class_token": source[f"{embeddings}.cls_token"].flatten(),
        "vision.embedding.position": source[f"{embeddings}.position_embeddings"][0],
        "text.embedding.token": source[f"{text}.word_embeddings.weight"],
        "text.embedding.position": source[f"{text}.position_embeddings.weight"],
        "text.embedding.token_type": source[f"{text}.token_type_embeddings.weight"],
        "fusion.modality": source[f"{embeddings}.token_type_embeddings.weight"],
    }
    for kind in ("weight", "bias"):
        out[f"text.embedding.norm.{kind}"] = source[f"{text}.LayerNorm.{kind}"]
        out[f"fusion.norm.{kind}"] = source[f"layernorm.{kind}"]
        out[f"pooler.{kind}"] = source[f"pooler.dense.{kind}"]
    names = {
        "attention": "attention.attention",
        "attention.out": "attention.output.dense",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    layers = {name.split(".")[2] for name in source if name.startswith("encoder.layer.")}
    for layer in layers:
        block = _bert_block(source, f"encoder.layer.{layer}", names)
        out |= {f"fusion.blocks.{layer}.{name}": value for name, value in block.items()}
    used = 8 + 6 + 16 * len(layers)
    extra = [name for name in source if not name.endswith(("position_ids", "token_type_ids"))]
    if len(extra) != used:
        raise ValueError(
            f"source must be a ViltModel's state dict of {used} tensors, got {len(extra)}"
        )
    return out


def clip_state_dict(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of preset `clip` from transformers' `CLIPModel.state_dict()`.

    Raises:
        KeyError: `source` lacks a weight of CLIPModel.
        ValueError: `source` holds weights that have no place here, named.
    """
    vision, text = "vision_model", "text_model"
    out = {
        "scale": source["logit_scale"],
        "image_projection.weight": source["visual_projection.weight"],
        "text_projection.weight": source["text_projection.weight"],
        "vision.embedding.weight": source[f"{vision}.embeddings.patch_embedding.weight"],
        "vision.embedding.class_token": source[f"{vision}.embeddings.class_embedding"],
        "vision.embedding.position": source[f"{vision}.embeddings.position_embedding.weight"],
        "text.embedding.token": source[f"{text}.embeddings.token_embedding.weight"],
        "text.embedding.position": source[f"{text}.embeddings.position_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        out[f"vision.embed_norm.{kind}"] = source[f"{vision}.pre_layrnorm.{kind}"]
        out[f"vision.norm.{kind}"] = source[f"{vision}.post_layernorm.{kind}"]
        out[f"text.norm.{kind}"] = source[f"{text}.final_layer_norm.{kind}"]
    used = 8 + 6
    for here, there in (("vision", vision), ("text", text)):
        layers = {
            name.split(".")[3] for name in source if name.startswith(f"{there}.encoder.layers.")
        }
        for layer in layers:
            block = _block(source, f"{there}.encoder.layers.{layer}")
            out |= {f"{here}.blocks.{layer}.{name}": value for name, value in block.items()}
            used += 16
    extra = [name for name in source if not name.endswith("position_ids")]
    if len(extra) != used:
        raise ValueError(
            f"source must be a CLIPModel's state dict of {used} tensors, got {len(extra)}"
        )
    return out
