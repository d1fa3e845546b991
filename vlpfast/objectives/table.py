"""The objectives there are, one record each: what holds of an objective whatever a run's settings.

`plan.Plan.of` merges what they read; their losses are `step`'s, in files that read what it ran.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

# What the text tower may read of a batch, each B texts: as they are, masked, and masked to be
# modelled without the image; and the image tower: as they are, and with hidden regions or patches.
TEXTS = ("text", "masked_text", "masked_alone")
IMAGES = ("image", "masked_image")


class Rows(Enum):
    """Groups of B (text, image) rows of the fusion call, in the order in which they are packed."""

    MIXED = "mixed"
    MATCHED = "matched"
    SECOND = "second"
    NEGATIVE_IMAGE = "negative_image"
    NEGATIVE_TEXT = "negative_text"
    MASKED = "masked"
    MASKED_IMAGE = "masked_image"
    MASKED_IMAGE_ALONE = "masked_image_alone"
    MASKED_TEXT_ALONE = "masked_text_alone"
    TOGETHER = "together"

    @property
    def reads(self) -> tuple[str | None, str | None]:
        """Of `TEXTS` and of `IMAGES` what they hold; None: nothing."""
        return _READS.get(self, ("text", "image"))


_READS: dict[Rows, tuple[str | None, str | None]] = {
    Rows.MASKED: ("masked_text", "image"),
    Rows.MASKED_IMAGE: ("text", "masked_image"),
    Rows.MASKED_IMAGE_ALONE: (None, "masked_image"),
    Rows.MASKED_TEXT_ALONE: ("masked_alone", None),
}


@dataclass(frozen=True)
class Objective:
    """What one objective needs, reads and predicts.

    Attributes:
        needs: parts of the model, of `ModelConfig.parts`.
        reads: of `TEXTS` and `IMAGES`, what it reads the towers' states of.
        embeds: the same of embeddings in the joint space.
        rows: fused rows that it reads.
        one_stack_rows: those that it reads in place of `reads`, where the fusion's stack is all
            that texts and images go through.
        together: `masking` "together" serves it.
        hides: what of the image it hides to predict it, if anything.
    """

    needs: tuple[str, ...]
    reads: tuple[str, ...] = ()
    embeds: tuple[str, ...] = ()
    rows: tuple[Rows, ...] = ()
    one_stack_rows: tuple[Rows, ...] = ()
    together: bool = False
    hides: Literal["nothing", "regions", "patches"] = "nothing"


_PAIR = ("image", "text")
_HARD = (Rows.MATCHED, Rows.NEGATIVE_IMAGE, Rows.NEGATIVE_TEXT)
_REGIONS = {"rows": (Rows.MASKED_IMAGE,), "together": True, "hides": "regions"}

# In the order of messages and weights.
OBJECTIVES = {
    "itc": Objective(("a joint space", "a learned scale"), embeds=_PAIR),
    "sigmoid": Objective(("a joint space", "a learned scale", "a learned bias"), embeds=_PAIR),
    "hinge": Objective(("a joint space",), embeds=_PAIR),
    "itm": Objective(("a fusion tower", "a matching head"), rows=_HARD, together=True),
    "mlm": Objective(("a fusion tower", "a token head"), rows=(Rows.MASKED,), together=True),
    "mtm": Objective(
        ("a stack that reads texts alone", "a token head"),
        reads=("masked_alone",),
        one_stack_rows=(Rows.MASKED_TEXT_ALONE,),
    ),
    "lm": Objective(("a text decoder",), reads=_PAIR),
    "wra": Objective(("fused image tokens",), rows=(Rows.MIXED,)),
    "mrfr": Objective(("region heads", "a region feature head"), **_REGIONS),
    "mrc": Objective(("region heads",), **_REGIONS),
    "mrckl": Objective(("region heads", "a background class"), **_REGIONS),
    "mra": Objective(("region heads", "an attribute head"), **_REGIONS),
    "qa": Objective(
        ("a fusion tower", "an answer head"), rows=(Rows.MATCHED, Rows.SECOND), together=True
    ),
    "mim": Objective(
        ("a code head",),
        reads=("masked_image",),
        one_stack_rows=(Rows.MASKED_IMAGE_ALONE,),
        hides="patches",
    ),
    "mvm": Objective(
        ("image tokens that read the text", "a code head"),
        rows=(Rows.MASKED_IMAGE,),
        hides="patches",
    ),
    "mpp": Objective(
        ("a color head",),
        reads=("masked_image",),
        one_stack_rows=(Rows.MASKED_IMAGE,),
        hides="patches",
    ),
    "vqkd": Objective(("a codebook", "a decoder of codes"), reads=("image",)),
    "kmeans": Objective(("a codebook", "k-means centres"), reads=("image",)),
    "classify": Objective(("a joint space", "a learned scale"), embeds=("image",)),
}
