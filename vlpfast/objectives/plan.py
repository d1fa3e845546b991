"""Plan: the passes a step needs, merged so that each module is called once.

ALBEF's published step calls the text tower twice and the fusion tower three times; here all texts
go through one text call and all (text, image) rows through one fusion call, over image keys
projected once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from vlpfast.objectives.config import ObjectivesConfig


class Rows(Enum):
    """Groups of B (text, image) rows of the fusion call, in the order in which they are packed."""

    MATCHED = "matched"
    MIXED = "mixed"
    NEGATIVE_IMAGE = "negative_image"
    NEGATIVE_TEXT = "negative_text"
    MASKED = "masked"
    MASKED_IMAGE = "masked_image"


@dataclass(frozen=True)
class Plan:
    """What one step runs.

    Attributes:
        masked_text: the text tower also reads the masked texts, in the same call.
        fusion: groups of rows of the one fusion call; empty where no objective needs fusion.
        hard_negatives: the contrastive loss also draws hard negatives.
        decodes: the text decoder reads the images too.
        masked_image: the image tower also reads the images with hidden regions, in the same call.
        embed_image, embed_text: an objective reads where they are in the joint space.
    """

    masked_text: bool
    fusion: tuple[Rows, ...]
    hard_negatives: bool
    masked_image: bool = False
    decodes: bool = False
    embed_image: bool = True
    embed_text: bool = True

    @classmethod
    def of(cls, config: ObjectivesConfig) -> Plan:
        """The passes that the enabled objectives need."""
        hard = bool(config.itm) and config.itm_negatives == "hard"
        matching = (Rows.MATCHED, Rows.NEGATIVE_IMAGE, Rows.NEGATIVE_TEXT) if hard else ()
        if config.itm and not hard:
            matching = (Rows.MIXED,)
        masked = (Rows.MASKED,) if config.mlm else ()
        hidden = (Rows.MASKED_IMAGE,) if config.masks_regions else ()
        contrast = bool(config.itc or config.sigmoid or config.hinge)
        return cls(
            bool(config.mlm),
            matching + masked + hidden,
            hard,
            config.masks_regions,
            bool(config.lm),
            embed_image=contrast or bool(config.classify),
            embed_text=contrast,
        )

    def fusion_rows(
        self,
        batch_size: int,
        hard_text: Tensor | None,
        hard_image: Tensor | None,
        device: torch.device,
        mixed_image: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """For every fusion row: the text sequence it holds and the image it reads, (R,) int64 each.

        Texts and images are numbered as their calls pack them: B clean ones, then B masked ones.
        `hard_text` (B,) is each image's negative text, `hard_image` (B,) each text's negative
        image, `mixed_image` (B,) the image of random matching.
        """
        own = torch.arange(batch_size, device=device)
        rows = {
            Rows.MATCHED: (own, own),
            Rows.NEGATIVE_IMAGE: (own, hard_image),
            Rows.NEGATIVE_TEXT: (hard_text, own),
            Rows.MASKED: (own + batch_size, own),
            Rows.MIXED: (own, mixed_image),
            Rows.MASKED_IMAGE: (own, own + batch_size),
        }
        texts, images = zip(*(rows[group] for group in self.fusion), strict=True)
        return torch.cat(texts), torch.cat(images)

    def sequences(self, group: Rows, batch_size: int, device: torch.device) -> Tensor:
        """(B,) int64 numbers of the fused sequences of `group`."""
        return torch.arange(batch_size, device=device) + self.first_sequence(group, batch_size)

    def first_sequence(self, group: Rows, batch_size: int) -> int:
        """Number of the first fused sequence of `group`."""
        return self.fusion.index(group) * batch_size
