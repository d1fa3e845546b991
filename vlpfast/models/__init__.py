"""Models: configuration, presets, towers, and the one VLPModel."""

from vlpfast.models.config import ModelConfig
from vlpfast.models.presets import SIZES, list_presets, preset_config
from vlpfast.models.vlp import VLPModel, create_model

__all__ = ["SIZES", "ModelConfig", "VLPModel", "create_model", "list_presets", "preset_config"]
