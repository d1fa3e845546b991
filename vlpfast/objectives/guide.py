"""The frozen model that gives the targets of masked images, of images that are written, and of a
tokenizer in training.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.data.batch import Batch
from vlpfast.models.config import ModelConfig
from vlpfast.models.load import load_model
from vlpfast.models.presets import missing
from vlpfast.models.vlp import VLPModel
from vlpfast.objectives.config import ObjectivesConfig


class Guide:
    """A trained model that reads the clean images before each step.

    Args:
        model: a tokenizer where `gives_codes`, else one with a vision tower.
        gives_codes: codes of patches, for `mim`; else features, for `vqkd`.
        draws: the codes are texts, of the rows `Batch.drawn`.
    """

    def __init__(self, model: VLPModel, gives_codes: bool, *, draws: bool = False) -> None:
        if gives_codes and model.tokenizer is None:
            served = "data.tasks 'image'" if draws else "mim"
            raise ValueError(
                f"objectives.guide of {served} is a tokenizer's run (vqkd_tiny, kmeans_tiny, ...), "
                f"got one of preset {model.config.preset!r}"
            )
        vision = model.config.vision
        if not gives_codes and (vision.front not in ("patches", "grid") or not vision.depth):
            raise ValueError(
                "objectives.guide of vqkd is a run with a vision transformer over patches, "
                f"got one of preset {model.config.preset!r}"
            )
        self.model, self.gives_codes = model.requires_grad_(False).eval(), gives_codes
        self.draws = draws

    @classmethod
    def open(
        cls, objectives: ObjectivesConfig, device: torch.device, *, draws: bool = False
    ) -> Guide | None:
        """The guide that `objectives` need, or where it `draws` the task "image"; None where they
        need none.

        Raises:
            ValueError: it is not named, or named in vain, or of another kind.
            FileNotFoundError: there is no run.
        """
        needed = [f"objectives.{n}" for n in ("mim", "mvm", "vqkd") if getattr(objectives, n)]
        needed += ["data.tasks 'image'"] if draws else []
        if len(needed) > 1 and draws:
            raise ValueError(f"objectives.guide serves {needed[0]} or {needed[-1]}, not both")
        codes = needed != ["objectives.vqkd"]
        if bool(needed) != bool(objectives.guide):
            raise ValueError(
                f"{needed[0]} needs objectives.guide, the run folder of "
                f"{'a tokenizer' if codes else 'a teacher'}"
                if needed
                else f"objectives.guide {objectives.guide!r} gives targets of mim, mvm, vqkd only, "
                "and of data.tasks 'image'"
            )
        if not needed:
            return None
        model, _ = load_model(Path(objectives.guide))
        return cls(model.to(device), codes, draws=draws)

    @property
    def num_codes(self) -> int:
        """Of one image; 0 where it gives features."""
        return self.model.config.num_patches if self.gives_codes else 0

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
            ValueError: it has other patches; or the model writes no codes, or not so many.
        """
        own = self.model.config
        if self.draws:
            return self._fit_vocabulary(config)
        if (config.image_size, config.num_patches) != (own.image_size, own.num_patches):
            raise ValueError(
                f"objectives.guide has {own.num_patches} patches of images of {own.image_size} "
                f"pixels; the model has {config.num_patches} of {config.image_size}"
            )
        if self.gives_codes:
            return replace(config, codes=own.codebook.size)
        width = own.embed_dim if self._projects else own.vision.dim
        return replace(config, codebook=replace(config.codebook, target_dim=width))

    def _fit_vocabulary(self, config: ModelConfig) -> ModelConfig:
        part, text = "image codes in its vocabulary", config.text
        if part not in config.parts:
            raise ValueError(f"data.tasks 'image' needs {part}; {missing(config.preset, part)}")
        if self.num_codes + 2 > text.context_length:
            raise ValueError(
                f"model.text.context_length must be >= {self.num_codes + 2} for the codes of "
                f"objectives.guide, got {text.context_length}"
            )
        return replace(config, text=replace(text, image_codes=self.model.config.codebook.size))

    @torch.no_grad()
    def fill(self, batch: Batch, *, first_code: int = 0) -> Batch:
        """`batch` with its codes or features; where it draws, with codes in the texts of drawn
        rows, in raster order, as ids from `first_code` on.
        """
        if self.draws:
            return self._write(batch, first_code)
        if self.gives_codes:
            return replace(batch, codes=self.model.image_codes(batch.images))
        return replace(batch, features=self.features(batch.images))

    def _write(self, batch: Batch, first_code: int) -> Batch:
        if not len(batch.drawn):
            return batch
        images, side = batch.images[batch.drawn], self.model.config.image_size
        if images.shape[1] != side:
            pixels = images.movedim(3, 1).float()
            pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
            images = pixels.round().to(torch.uint8).movedim(1, 3)
        text, codes = batch.text, self.model.image_codes(images)
        places = 1 + torch.arange(codes.shape[1], device=codes.device)
        places = (text.first()[batch.drawn][:, None] + places).flatten()
        ids = text.values.index_copy(0, places, first_code + codes.flatten())
        return replace(batch, text=text.with_values(ids))

    def features(self, images: Tensor) -> Tensor:
        """(B, P, E): the tower's patches, in the joint space where its pooled token goes there by a
        linear map alone (CLIP).
        """
        states = self.model.image_states(self.model.encode_image(images).tokens)
        patches = self.model.patches(states)
        return self.model.image_projection(patches) if self._projects else patches

    @property
    def _projects(self) -> bool:
        pooled = self.model.config.vision.pool
        return isinstance(self.model.image_projection, nn.Linear) and pooled != "map"
