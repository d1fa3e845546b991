"""Which tensor is what in other libraries' models: a file for each library."""

from __future__ import annotations

from collections.abc import Callable

from vlpfast.integrations.layouts import open_clip, transformers, unilm
from vlpfast.integrations.weights import Layout
from vlpfast.models.config import ModelConfig

LAYOUTS: dict[str, dict[str, Callable[[ModelConfig], Layout]]] = {
    "transformers": {
        "align": transformers.align,
        "beit2": transformers.beit,
        "blip": transformers.blip,
        "clip": lambda config: transformers.clip(config.vision.depth, config.text.depth),
        "flava": transformers.flava,
        "lxmert": transformers.lxmert,
        "siglip": transformers.siglip,
    },
    "open_clip": {
        "clip": open_clip.clip,
        "coca": open_clip.coca,
        "siglip": open_clip.siglip,
    },
    "unilm": {"beit3": unilm.beit3},
}
