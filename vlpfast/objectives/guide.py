"""The frozen model that gives the targets of masked images and of a tokenizer in training."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vlpfast.data.batch import Batch
from vlpfast.models.config import ModelConfig
from vlpfast.models.load import load_model
from vlpfast.models.vlp import VLPModel
from vlpfast.objectives.config import ObjectivesConfig


class Guide:
    """A trained model that reads the clean images before each step.

    Args:
        model: a tokenizer where `gives_codes`, else one with a vision tower.
        gives_codes: codes of patches, for `mim`; else features, for `vqkd`.
    """

    def __init__(self, model: VLPModel, gives_codes: bool) -> None:
        if gives_codes and model.tokenizer is None:
            raise ValueError(
                "objectives.guide of mim is a tokenizer's run (vqkd_tiny, kmeans_tiny, ...), "
                f"got one of preset {model.config.preset!r}"
            )
        vision = model.config.vision
        if not gives_codes and (vision.front not in ("patches", "grid") or not vision.depth):
            raise ValueError(
                "objectives.guide of vqkd is a run with a vision transformer over patches, "
                f"got one of preset {model.config.preset!r}"
            )
        self.model, self.gives_codes = model.requires_grad_(False).eval(), gives_codes

    @classmethod
    def open(cls, objectives: ObjectivesConfig, device: torch.device) -> Guide | None:
        """The guide that `objectives` needs; None where they need none.

        Raises:
            ValueError: it is not named, or named in vain, or of another kind.
            FileNotFoundError: there is no run.
        """
        needed = [name for name in ("mim", "mvm", "vqkd") if getattr(objectives, name)]
        if bool(needed) != bool(objectives.guide):
            raise ValueError(
                f"objectives.{needed[0]} needs objectives.guide, the run folder of "
                f"{'a tokenizer' if bool(objectives.mim or objectives.mvm) else 'a teacher'}"
                if needed
                else f"objectives.guide {objectives.guide!r} gives targets of mim, mvm, vqkd only"
            )
        if not needed:
            return None
        model, _ = load_model(Path(objectives.guide))
        return cls(model.to(device), bool(objectives.mim or objectives.mvm))

    @property
    def sha256(self) -> str:
        """Of all its weights."""
        digest = hashlib.sha256()
        for tensor in self.model.state_dict().values():
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def fit(self, config: ModelConfig) -> ModelConfig:
        """The configuration of a model that learns from this guide.

        Raises:
            ValueError: it has other patches.
        """
        own = self.model.config
        if (config.image_size, config.num_patches) != (own.image_size, own.num_patches):
            raise ValueError(
                f"objectives.guide has {own.num_patches} patches of images of {own.image_size} "
                f"pixels; the model has {config.num_patches} of {config.image_size}"
            )
        if self.gives_codes:
            return replace(config, codes=own.codebook.size)
        width = own.embed_dim if self._projects else own.vision.dim
        return replace(config, codebook=replace(config.codebook, target_dim=width))

    @torch.no_grad()
    def fill(self, batch: Batch) -> Batch:
        """`batch` with its codes or features."""
        if self.gives_codes:
            return replace(batch, codes=self.model.image_codes(batch.images))
        return replace(batch, features=self.features(batch.images))

    def features(self, images: Tensor) -> Tensor:
        """(B, P, E): the tower's patches, in the joint space where its pooled token goes there by a
        linear map alone (CLIP).
        """
        patches = self.model.patches(self.model.encode_image(images).tokens)
        return self.model.image_projection(patches) if self._projects else patches

    @property
    def _projects(self) -> bool:
        pooled = self.model.config.vision.pool
        return isinstance(self.model.image_projection, nn.Linear) and pooled != "map"
