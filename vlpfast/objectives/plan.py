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
    NEGATIVE_IMAGE = "negative_image"
    NEGATIVE_TEXT = "negative_text"
    MASKED = "masked"


@dataclass(frozen=True)
class Plan:
    """What one step runs.

    Attributes:
        masked_text: the text tower also reads the masked texts, in the same call.
        fusion: groups of rows of the one fusion call; empty where no objective needs fusion.
        hard_negatives: the contrastive loss also draws hard negatives.
    """

    masked_text: bool
    fusion: tuple[Rows, ...]
    hard_negatives: bool

    @classmethod
    def of(cls, config: ObjectivesConfig) -> Plan:
        """The passes that the enabled objectives need."""
        matching = (Rows.MATCHED, Rows.NEGATIVE_IMAGE, Rows.NEGATIVE_TEXT) if config.itm else ()
        masked = (Rows.MASKED,) if config.mlm else ()
        return cls(bool(config.mlm), matching + masked, bool(config.itm))

    def fusion_rows(
        self,
        batch_size: int,
        hard_text: Tensor | None,
        hard_image: Tensor | None,
        device: torch.device,
    ):
        """For every fusion row: the text sequence it holds and the image it reads, (R,) int64 each.

        Text sequences are numbered as the text call packs them: B clean ones, then B masked ones.
        `hard_text` (B,) is each image's negative text, `hard_image` (B,) each text's negative
        image.
        """
        own = torch.arange(batch_size, device=device)
        rows = {
            Rows.MATCHED: (own, own),
            Rows.NEGATIVE_IMAGE: (own, hard_image),
            Rows.NEGATIVE_TEXT: (hard_text, own),
            Rows.MASKED: (own + batch_size, own),
        }
        texts, images = zip(*(rows[group] for group in self.fusion), strict=True)
        return torch.cat(texts), torch.cat(images)

    def first_sequence(self, group: Rows, batch_size: int) -> int:
        """Number of the first fused sequence of `group`."""
        return self.fusion.index(group) * batch_size
