"""Recipes: functions that return a whole RunConfig, found by name; the command line changes single
fields of what they return.

A recipe is named for its system and size (`albef_base`), or for its system and the embedded data
(`albef_scenes`).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from vlpfast.config import close_match
from vlpfast.train.config import RunConfig

_SYSTEMS = (
    "albef",
    "align",
    "beit2",
    "beit3",
    "blip",
    "clip",
    "coca",
    "flava",
    "flip",
    "kmeans",
    "lxmert",
    "metalm",
    "pali",
    "pixel_bert",
    "siglip",
    "uni_perceiver",
    "uni_perceiver_moe",
    "unified_io",
    "uniter",
    "vilbert",
    "vilt",
    "vlmo",
    "vqkd",
    "vsepp",
    "x_lxmert",
)
_RECIPES: dict[str, Callable[[], RunConfig]] = {
    f"{system}_{variant}": recipe
    for system in _SYSTEMS
    for variant, recipe in import_module(f"{__name__}.{system}").RECIPES.items()
}


def names() -> list[str]:
    """Names of all recipes."""
    return sorted(_RECIPES)


def get(name: str) -> RunConfig:
    """The configuration of recipe `name`.

    Raises:
        ValueError: there is no such recipe.
    """
    if name not in _RECIPES:
        raise ValueError(f"unknown recipe {name!r}{close_match(name, _RECIPES)}")
    return _RECIPES[name]()
