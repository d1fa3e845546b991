"""What each objective needs of a model, and the error where a model does not have it."""

from __future__ import annotations

from vlpfast.models.config import ModelConfig
from vlpfast.models.presets import missing
from vlpfast.objectives.config import ObjectivesConfig

# Of `ModelConfig.parts`.
NEEDS = {
    "itc": ("a joint space", "a learned scale"),
    "sigmoid": ("a joint space", "a learned scale", "a learned bias"),
    "hinge": ("a joint space",),
    "itm": ("a fusion tower", "a matching head"),
    "mlm": ("a fusion tower", "a token head"),
    "wra": ("fused image tokens",),
    "mrfr": ("region heads",),
    "mrc": ("region heads",),
    "mrckl": ("region heads",),
    "classify": ("a joint space", "a learned scale"),
    "lm": ("a text decoder",),
}


def check_wiring(model: ModelConfig, objectives: ObjectivesConfig) -> None:
    """Raises ValueError where an enabled objective needs a part that the model does not have, or
    leaves a parameter of the similarities without a gradient.
    """
    for name in objectives.weights:
        for part in NEEDS[name]:
            if part not in model.parts:
                raise ValueError(f"objectives.{name} needs {part}; {missing(model.preset, part)}")
    idle = "a learned scale" in model.parts and not (objectives.itc or objectives.sigmoid)
    if objectives.hinge and idle:
        raise ValueError(
            f"objectives.hinge takes cosines: the learned scale of preset {model.preset!r} would "
            "have no gradient. Set model.scale to 'none' and model.logit_bias to False (as preset "
            "'vse++' has them), or train itc or sigmoid too"
        )
