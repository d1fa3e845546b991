"""vlpfast: vision-language pre-training with the same numbers and far less work.

`vlpfast.ops` holds the fused operations, `create_model` the systems of the field, `train` runs a
recipe. Names are loaded on first use, so that `import vlpfast` costs nothing.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOMES = {
    "Batch": "vlpfast.data.batch",
    "ModelConfig": "vlpfast.models",
    "ObjectivesConfig": "vlpfast.objectives",
    "PretrainStep": "vlpfast.objectives",
    "Ragged": "vlpfast.ragged",
    "RunConfig": "vlpfast.train.config",
    "VLPModel": "vlpfast.models",
    "create_model": "vlpfast.models",
    "list_presets": "vlpfast.models",
    "load_run": "vlpfast.eval.load",
    "preset_config": "vlpfast.models",
}
_PACKAGES = ("data", "eval", "models", "objectives", "ops", "recipes", "train")

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name in _PACKAGES:
        return importlib.import_module(f"vlpfast.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vlpfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_PACKAGES})
