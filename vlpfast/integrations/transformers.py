"""Weights of Hugging Face transformers' CLIPModel as a vlpfast state dict, without a model at hand.

`integrations.weights` does this and more for a model: checked against it, with a report, and back.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vlpfast.integrations.layouts import transformers_clip
from vlpfast.integrations.weights import convert


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
        ValueError: `source` lacks weights of CLIPModel, or holds some that have no place here;
            they are named.
    """
    depths = [
        len({n.split(".")[3] for n in source if n.startswith(f"{tower}_model.encoder.layers.")})
        for tower in ("vision", "text")
    ]
    return convert(transformers_clip(*depths), source)[0]
