"""The objectives there are, one record each: what holds of an objective whatever a run's settings.

The passes it needs are `plan.Plan.of`'s, its loss is called by `step.PretrainStep`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Objective:
    """What one objective needs and predicts.

    Attributes:
        needs: parts of the model, of `ModelConfig.parts`.
        together: `masking` "together" serves it.
        hides: what of the image it hides to predict it, if anything.
    """

    needs: tuple[str, ...]
    together: bool = False
    hides: Literal["nothing", "regions", "patches"] = "nothing"


# In the order of messages and weights.
OBJECTIVES = {
    "itc": Objective(("a joint space", "a learned scale")),
    "sigmoid": Objective(("a joint space", "a learned scale", "a learned bias")),
    "hinge": Objective(("a joint space",)),
    "itm": Objective(("a fusion tower", "a matching head"), together=True),
    "mlm": Objective(("a fusion tower", "a token head"), together=True),
    "mtm": Objective(("a stack that reads texts alone", "a token head")),
    "lm": Objective(("a text decoder",)),
    "wra": Objective(("fused image tokens",)),
    "mrfr": Objective(("region heads", "a region feature head"), together=True, hides="regions"),
    "mrc": Objective(("region heads",), together=True, hides="regions"),
    "mrckl": Objective(("region heads", "a background class"), together=True, hides="regions"),
    "mra": Objective(("region heads", "an attribute head"), together=True, hides="regions"),
    "qa": Objective(("a fusion tower", "an answer head"), together=True),
    "mim": Objective(("a code head",), hides="patches"),
    "mvm": Objective(("image tokens that read the text", "a code head"), hides="patches"),
    "mpp": Objective(("a color head",), hides="patches"),
    "vqkd": Objective(("a codebook", "a decoder of codes")),
    "kmeans": Objective(("a codebook", "k-means centres")),
    "classify": Objective(("a joint space", "a learned scale")),
}
