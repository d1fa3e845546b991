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
    MASKED_TEXT_ALONE = "masked_text_alone"
    MASKED_IMAGE_ALONE = "masked_image_alone"
    TOGETHER = "together"
    SECOND = "second"


@dataclass(frozen=True)
class Plan:
    """What one step runs.

    Attributes:
        masked_text: the text tower also reads the masked texts, in the same call.
        fusion: groups of rows of the one fusion call; empty where no objective needs fusion.
        hard_negatives: the contrastive loss also draws hard negatives.
        fetches: hard negatives are of all ranks: B texts and B images come from where they are
            (`objectives.negatives`).
        decodes: the text decoder reads the images too.
        masked_image: the image tower also reads the images with hidden regions or patches, in the
            same call.
        text, clean_image: the towers read the texts, and the images as they are; only losses on
            images alone do without.
        masked_alone: the text tower also reads the texts masked for modelling without images.
        embed_image, embed_text: an objective reads where they are in the joint space.
        image_tokens: an objective reads what the image tower makes of each patch.
        causal: masked texts are read causally.
        together: of texts and images the towers read one version, masked where there is one, and
            the one group of rows serves every objective.
    """

    masked_text: bool
    fusion: tuple[Rows, ...]
    hard_negatives: bool
    masked_image: bool = False
    text: bool = True
    clean_image: bool = True
    masked_alone: bool = False
    embed_image: bool = True
    embed_text: bool = True
    image_tokens: bool = True
    causal: bool = False
    decodes: bool = False
    together: bool = False
    fetches: bool = False

    @classmethod
    def of(
        cls,
        config: ObjectivesConfig,
        *,
        one_stack: bool = False,
        over_ranks: bool = False,
        images: int = 1,
    ) -> Plan:
        """The passes that the enabled objectives need; `one_stack` says whether one modality's
        tower is the fusion's stack, `over_ranks` whether there are other ranks, `images` how many
        images a question is about.
        """
        if config.masking == "together":
            return cls(
                bool(config.mlm),
                (Rows.TOGETHER,),
                False,
                config.masks_regions,
                embed_image=False,
                embed_text=False,
                together=True,
            )
        hard = bool(config.itm) and config.itm_negatives != "random"
        over_all = hard and config.itm_negatives == "hard-global"
        matching = (Rows.MATCHED, Rows.NEGATIVE_IMAGE, Rows.NEGATIVE_TEXT) if hard else ()
        if config.itm and not hard:
            matching = (Rows.MIXED,)
        if config.qa and not hard:
            matching += (Rows.MATCHED, Rows.SECOND)[:images]
        masked = (Rows.MASKED,) if config.mlm else ()
        pairs = config.masks_regions or config.mvm or (config.mpp and one_stack)
        hidden = (Rows.MASKED_IMAGE,) if pairs else ()
        alone = (Rows.MASKED_IMAGE_ALONE,) if config.mim and one_stack else ()
        alone += (Rows.MASKED_TEXT_ALONE,) if config.mtm and one_stack else ()
        images_alone = {"mim", "vqkd"} if one_stack else {"mim", "vqkd", "mpp"}
        text = bool(config.weights.keys() - images_alone)
        contrast = bool(config.itc or config.sigmoid or config.hinge)
        fusion = matching + masked + hidden + alone
        codes = bool(config.vqkd or config.kmeans)
        return cls(
            masked_text=bool(config.mlm),
            fusion=fusion,
            hard_negatives=hard and not over_all,
            masked_image=config.masks_regions or config.hides_patches,
            text=text,
            clean_image=text or bool(config.vqkd),
            masked_alone=bool(config.mtm),
            embed_image=contrast or bool(config.classify),
            embed_text=contrast,
            image_tokens=bool(fusion or config.lm or config.hides_patches) or codes,
            causal=bool(config.mlm) and config.mlm_causal,
            decodes=bool(config.lm),
            fetches=over_all and over_ranks,
        )

    def fusion_rows(
        self,
        batch_size: int,
        hard_text: Tensor | None,
        hard_image: Tensor | None,
        device: torch.device,
        mixed_image: Tensor | None = None,
        shown: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """For every fusion row: the text sequence it holds and the image it reads, (R,) int64 each.

        Texts and images are numbered as their calls pack them: B clean ones, then B masked ones,
        then the B texts masked for modelling without images; then those of other ranks, B each;
        the number after the last stands for none.
        `hard_text` (B,) is each image's negative text, `hard_image` (B,) each text's negative
        image, `mixed_image` (B,) the image of random matching, `shown` the images that questions
        are about (`Batch.shown`), which have the call for themselves.
        """
        own = torch.arange(batch_size, device=device)
        no_text = torch.full_like(own, batch_size * (self.num_texts + self.fetches))
        no_image = torch.full_like(own, batch_size * (self.num_images + self.fetches))
        masked_image = own + batch_size * self.clean_image
        rows = {
            Rows.MATCHED: (own, own if shown is None else shown[0]),
            Rows.NEGATIVE_IMAGE: (own, hard_image),
            Rows.NEGATIVE_TEXT: (hard_text, own),
            Rows.MASKED: (own + batch_size, own),
            Rows.MIXED: (own, mixed_image),
            Rows.MASKED_IMAGE: (own, masked_image),
            Rows.MASKED_IMAGE_ALONE: (no_text, masked_image),
            Rows.MASKED_TEXT_ALONE: (own + batch_size * (1 + self.masked_text), no_image),
            Rows.SECOND: (own, None if shown is None else shown[-1]),
            Rows.TOGETHER: (own, own if mixed_image is None else mixed_image),
        }
        if self.together and shown is not None:
            rows[Rows.TOGETHER] = rows[Rows.MATCHED]
        texts, images = zip(*(rows[group] for group in self.fusion), strict=True)
        return torch.cat(texts), torch.cat(images)

    @property
    def reads_pairs(self) -> bool:
        """Whether tokens of texts and images meet."""
        return bool(self.fusion) or self.decodes

    @property
    def num_texts(self) -> int:
        """How many times B texts the text tower reads."""
        return self.text * (1 + self.masked_text + self.masked_alone)

    @property
    def num_images(self) -> int:
        """How many times B images the image tower reads."""
        return self.clean_image + self.masked_image

    @property
    def reads_alone(self) -> bool:
        """Whether the fusion call has rows of one modality."""
        return not {Rows.MASKED_TEXT_ALONE, Rows.MASKED_IMAGE_ALONE}.isdisjoint(self.fusion)

    def sequences(self, group: Rows, batch_size: int, device: torch.device) -> Tensor:
        """(B,) int64 numbers of the fused sequences of `group`."""
        return torch.arange(batch_size, device=device) + self.first_sequence(group, batch_size)

    def first_sequence(self, group: Rows, batch_size: int) -> int:
        """Number of the first fused sequence of `group`."""
        return 0 if self.together else self.fusion.index(group) * batch_size
