"""Uni-Perceiver-MoE: `uni_perceiver` with experts in every second block."""

from __future__ import annotations

from functools import partial

from vlpfast.recipes import uni_perceiver

_PRESET = "uni-perceiver-moe"
RECIPES = {
    "tiny": partial(uni_perceiver.compact, "tiny", _PRESET),
    "small": partial(uni_perceiver.compact, "small", _PRESET),
    "base": partial(uni_perceiver.base, _PRESET),
    "scenes": partial(uni_perceiver.scenes, _PRESET, steps=150),
}
