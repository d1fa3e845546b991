"""A VLPModel's tensors under the names of `albef_eager.Towers`: weights, or their gradients."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vlpfast.models.config import ModelConfig

_PARTS = {
    "vision.embedding.weight": "vision.patch.weight",
    "vision.embedding.bias": "vision.patch.bias",
    "vision.embedding.class_token": "vision.class_token",
    "vision.embedding.position": "vision.position",
    "text.embedding.token": "bert.word.weight",
    "text.embedding.position": "bert.position.weight",
    "text.embedding.token_type": "bert.token_type.weight",
    "text.embedding.norm": "bert.embed_norm",
    "token_head.dense": "bert.head_dense",
    "token_head.norm": "bert.head_norm",
    "token_head.bias": "bert.head_bias",
    "image_projection": "vision_proj",
    "text_projection": "text_proj",
    "match_head": "itm_head",
    "scale": "temp",
    "vision.norm": "vision.norm",
    "text.norm": "bert.text_norm",
    "fusion.norm": "bert.fusion_norm",
}
_STACKS = {"vision": "vision.layers", "text": "bert.text_layers", "fusion": "bert.fusion_layers"}
_BLOCK = {
    "attention.out": "attention.dense",
    "norm1": "norm1",
    "cross.q": "cross.query",
    "cross.out": "cross.dense",
    "norm_cross": "norm_cross",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "norm2": "norm2",
}


def eager_weights(source: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """`source`, tensors by a VLPModel's parameter names, by the names of `albef_eager.Towers`.

    Joint projections are split into the views that each layer has of its own.

    Raises:
        KeyError: `source` holds a name that has no counterpart.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in source.items():
        named |= _renamed(name, tensor, config)
    return named


def _renamed(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    stem, _, kind = name.rpartition(".")
    stack, _, rest = name.partition(".blocks.")
    if stem == "fusion.image_kv":
        layers = tensor.unflatten(0, (config.fusion.depth, 2, -1))
        return {
            f"bert.fusion_layers.{number}.cross.{part}.{kind}": layers[number, i]
            for number in range(config.fusion.depth)
            for i, part in enumerate(("key", "value"))
        }
    if name in _PARTS:
        return {_PARTS[name]: tensor}
    if not rest:
        return {f"{_PARTS[stem]}.{kind}": tensor}
    number, _, part = rest.rpartition(".")[0].partition(".")
    layer = f"{_STACKS[stack]}.{number}"
    if part != "attention.qkv":
        return {f"{layer}.{_BLOCK[part]}.{kind}": tensor}
    if stack == "vision":
        return {f"{layer}.attention.qkv.{kind}": tensor}
    parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
    return {f"{layer}.attention.{part}.{kind}": chunk for part, chunk in parts}
