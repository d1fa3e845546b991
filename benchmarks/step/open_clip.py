"""open_clip's CLIP with a VLPModel's shape, and the names of its weights."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping

from torch import Tensor, nn

from benchmarks.step.batches import CLIP_LEN
from vlpfast.models.config import ModelConfig

_PARTS = {
    "vision.embedding.weight": "visual.conv1.weight",
    "vision.embedding.class_token": "visual.class_embedding",
    "vision.embedding.position": "visual.positional_embedding",
    "vision.embed_norm": "visual.ln_pre",
    "vision.norm": "visual.ln_post",
    "text.embedding.token": "token_embedding.weight",
    "text.embedding.position": "positional_embedding",
    "text.norm": "ln_final",
    "scale": "logit_scale",
}
# open_clip multiplies by these from the right.
_TRANSPOSED = {
    "image_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
}
_STACKS = {"vision": "visual.transformer.resblocks", "text": "transformer.resblocks"}
_BLOCK = {
    "attention.qkv.weight": "attn.in_proj_weight",
    "attention.qkv.bias": "attn.in_proj_bias",
    "attention.out": "attn.out_proj",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def open_clip_weights(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`source`, tensors by the parameter names of a VLPModel of preset "clip", by open_clip's.

    Raises:
        KeyError: `source` holds a name that has no counterpart.
    """
    return dict(_renamed(name, tensor) for name, tensor in source.items())


def _renamed(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    if name in _TRANSPOSED:
        return _TRANSPOSED[name], tensor.T
    stack, _, rest = name.partition(".blocks.")
    if rest:
        number, _, part = rest.partition(".")
        return f"{_STACKS[stack]}.{number}.{_lookup(_BLOCK, part)}", tensor
    return _lookup(_PARTS, name), tensor


def _lookup(names: Mapping[str, str], name: str) -> str:
    if name in names:
        return names[name]
    stem, _, kind = name.rpartition(".")
    return f"{names[stem]}.{kind}"


def open_clip_module(config: ModelConfig, *, patch_dropout: float = 0.0) -> nn.Module:
    """open_clip's CLIP for a `config` of preset "clip", with fresh weights.

    Args:
        patch_dropout: share of patches dropped in training, after they are embedded.

    Raises:
        ImportError: open_clip is not installed.
    """
    if importlib.util.find_spec("open_clip") is None:
        raise ImportError("open_clip is not installed")
    library = importlib.import_module("tests._peers").open_clip_model()
    vision, text = config.vision, config.text
    return library.CLIP(
        config.embed_dim,
        library.CLIPVisionCfg(
            layers=vision.depth,
            width=vision.dim,
            head_width=vision.dim // vision.heads,
            patch_size=vision.patch_size,
            image_size=config.image_size,
            patch_dropout=patch_dropout,
        ),
        library.CLIPTextCfg(
            context_length=min(CLIP_LEN, text.context_length),
            vocab_size=text.vocab_size,
            width=text.dim,
            heads=text.heads,
            layers=text.depth,
        ),
        quick_gelu=vision.activation == "quick_gelu",
    )
