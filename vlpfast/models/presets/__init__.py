"""The systems of the field as configurations of one model, a file for each way text and image meet.

`base` has the published sizes; `tiny` and `small` train on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace

from vlpfast.config import close_match
from vlpfast.models.config import ModelConfig
from vlpfast.models.presets import (
    caption,
    co,
    codes,
    concat,
    cross,
    dual,
    experts,
    generalist,
    seq2seq,
)
from vlpfast.models.presets.sizes import SHAPES, Parts, Shape, build

_PRESETS: dict[str, Callable[[Shape], Parts]] = {
    "albef": cross.albef,
    "align": dual.align,
    "beit2": codes.beit2,
    "beit3": experts.beit3,
    "blip": caption.blip,
    "clip": dual.clip,
    "coca": caption.coca,
    "flava": concat.flava,
    "flip": dual.flip,
    "kmeans": codes.kmeans,
    "lxmert": co.lxmert,
    "metalm": generalist.metalm,
    "pali": seq2seq.pali,
    "pixel-bert": concat.pixel_bert,
    "siglip": dual.siglip,
    "unified-io": seq2seq.unified_io,
    "uni-perceiver": generalist.uni_perceiver,
    "uni-perceiver-moe": generalist.uni_perceiver_moe,
    "uniter": concat.uniter,
    "vilbert": co.vilbert,
    "vilt": concat.vilt,
    "vlmo": experts.vlmo,
    "vqkd": codes.vqkd,
    "vse++": dual.vsepp,
    "x-lxmert": co.x_lxmert,
}
SIZES = tuple(SHAPES)


# Parts that a preset has or has not by a setting.
_SETTINGS = {
    "an attribute head": "model.vision.region_attributes",
    "an answer head": "data.answers, which sets model.answers",
}


def missing(preset: str, part: str) -> str:
    """What an error says where a preset lacks one of `ModelConfig.parts`."""
    bare = part.removeprefix("an ").removeprefix("a ")
    if part in _SETTINGS:
        return f"preset {preset!r} has no {bare}: set {_SETTINGS[part]}"
    having = [name for name in list_presets() if part in preset_config(name).parts]
    return f"preset {preset!r} has no {bare}; presets that have: {', '.join(map(repr, having))}"


def list_presets() -> list[str]:
    """Names accepted by `create_model` and `preset_config`."""
    return sorted(_PRESETS)


def _check_fields(config: object, names: Iterable[str], prefix: str = "") -> None:
    """Raises ValueError for the first of `names` that is no field of `config`, a dataclass."""
    known = [f.name for f in fields(config)]
    unknown = [name for name in names if name not in known]
    if unknown:
        hint = close_match(unknown[0], known)
        raise ValueError(f"unknown model field {prefix + unknown[0]!r}{hint}")


def preset_config(
    preset: str,
    size: str = "tiny",
    *,
    vocab_size: int | None = None,
    context_length: int | None = None,
    **overrides,
) -> ModelConfig:
    """The configuration of a preset.

    Args:
        preset: one of `list_presets()`.
        size: "tiny", "small" or "base".
        vocab_size, context_length: of the text tower, where they differ from the preset's.
        **overrides: other fields of `ModelConfig`; of a stack a whole one, or some of its fields as
            a dict: `vision={"depth": 6}`.

    Raises:
        ValueError: unknown preset, size or field.
    """
    if preset not in _PRESETS:
        raise ValueError(f"unknown preset {preset!r}{close_match(preset, list_presets())}")
    if size not in SIZES:
        raise ValueError(f"size must be one of {list(SIZES)}, got {size!r}")
    config = build(preset, size, _PRESETS[preset])
    _check_fields(config, overrides)
    for name, value in overrides.items():
        if isinstance(value, Mapping):
            _check_fields(getattr(config, name), value, f"{name}.")
            overrides[name] = replace(getattr(config, name), **value)
    config = replace(config, **overrides)
    text = {"vocab_size": vocab_size, "context_length": context_length}
    return replace(
        config, text=replace(config.text, **{k: v for k, v in text.items() if v is not None})
    )
