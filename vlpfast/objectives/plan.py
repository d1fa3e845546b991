"""Plan: the passes a step needs, merged so that each module is called once.

ALBEF's published step calls the text tower twice and the fusion tower three times; here all texts
go through one text call and all (text, image) rows through one fusion call, over image keys
projected once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.objectives.table import IMAGES, OBJECTIVES, TEXTS, Rows


@dataclass(frozen=True)
class Plan:
    """What one step runs.

    Attributes:
        texts, images: of `TEXTS` and `IMAGES`, what the towers read, in one call each.
        fusion: groups of rows of the one fusion call; empty where no objective needs fusion.
        embeds: of both, what an objective reads of where it is in the joint space.
        image_tokens: an objective reads what the image tower makes of each patch.
        hard_negatives: the contrastive loss also draws hard negatives.
        fetches: hard negatives are of all ranks: B texts and B images come from where they are
            (`objectives.negatives`).
        decodes: the text decoder reads the images too.
        causal: masked texts are read causally.
        together: of texts and images the towers read one version, masked where there is one, and
            the one group of rows serves every objective.
    """

    texts: tuple[str, ...]
    images: tuple[str, ...]
    fusion: tuple[Rows, ...] = ()
    embeds: tuple[str, ...] = ()
    image_tokens: bool = True
    hard_negatives: bool = False
    fetches: bool = False
    decodes: bool = False
    causal: bool = False
    together: bool = False

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
            text = "masked_text" if config.mlm else "text"
            image = "masked_image" if config.masks_regions else "image"
            return cls((text,), (image,), (Rows.TOGETHER,), together=True)
        enabled = {name: OBJECTIVES[name] for name in config.weights}
        rows = {
            name: (one_stack and objective.one_stack_rows) or objective.rows
            for name, objective in enabled.items()
        }
        if config.mixes_pairs:
            rows["itm"] = (Rows.MIXED,)
        if config.qa:
            rows["qa"] = rows["qa"][:images]
        fused, embeds = set().union(*rows.values()), _union(o.embeds for o in enabled.values())
        reads = _union(o.reads for name, o in enabled.items() if not rows[name])
        versions = reads | embeds | _union(group.reads for group in fused)
        hard = bool(config.itm) and not config.mixes_pairs
        over_all = hard and config.itm_negatives == "hard-global"
        return cls(
            tuple(text for text in TEXTS if text in versions),
            tuple(image for image in IMAGES if image in versions),
            tuple(group for group in Rows if group in fused),
            tuple(sorted(embeds)),
            image_tokens=bool(fused) or not reads.isdisjoint(IMAGES),
            hard_negatives=hard and not over_all,
            fetches=over_all and over_ranks,
            decodes=bool(config.lm),
            causal=bool(config.mlm) and config.mlm_causal,
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

        Texts and images are numbered as their calls pack them, B of each of `texts` and `images`;
        then those of other ranks, B each; the number after the last stands for none.
        `hard_text` (B,) is each image's negative text, `hard_image` (B,) each text's negative
        image, `mixed_image` (B,) the image of random matching, `shown` the images that questions
        are about (`Batch.shown`), which have the call for themselves.
        """
        own = torch.arange(batch_size, device=device)
        drawn = {
            Rows.MIXED: (None, mixed_image),
            Rows.MATCHED: (None, None if shown is None else shown[0]),
            Rows.SECOND: (None, None if shown is None else shown[-1]),
            Rows.NEGATIVE_IMAGE: (None, hard_image),
            Rows.NEGATIVE_TEXT: (hard_text, None),
            Rows.TOGETHER: (own, own if mixed_image is None else mixed_image),
        }
        if self.together and shown is not None:
            drawn[Rows.TOGETHER] = (own, shown[0])
        rows = []
        for group in self.fusion:
            for read, versions, chosen in zip(
                group.reads, (self.texts, self.images), drawn.get(group, (None, None)), strict=True
            ):
                if read is None:
                    chosen = torch.full_like(own, batch_size * (len(versions) + self.fetches))
                elif chosen is None:
                    chosen = own + batch_size * versions.index(read)
                rows.append(chosen)
        return torch.cat(rows[::2]), torch.cat(rows[1::2])

    @property
    def reads_pairs(self) -> bool:
        """Whether tokens of texts and images meet."""
        return bool(self.fusion) or self.decodes

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


def _union(parts: Iterable[tuple[str | None, ...]]) -> set[str | None]:
    return {name for part in parts for name in part}
