"""What each objective needs of a model, and the error where a model does not have it."""

from __future__ import annotations

from collections.abc import Callable

from vlpfast.models.config import ModelConfig
from vlpfast.models.presets import presets_with
from vlpfast.objectives.config import ObjectivesConfig

_NEEDS: tuple[tuple[str, str, Callable[[ModelConfig], bool]], ...] = (
    ("itc", "a learned scale of the similarities", lambda model: model.scale != "none"),
    ("sigmoid", "a learned scale of the similarities", lambda model: model.scale != "none"),
    ("sigmoid", "a learned bias of the similarities", lambda model: model.logit_bias),
    ("itm", "a fusion tower", lambda model: model.fusion.depth > 0),
    ("mlm", "a fusion tower", lambda model: model.fusion.depth > 0),
    ("mlm", "a token head", lambda model: model.mlm_head),
)


def check_wiring(model: ModelConfig, objectives: ObjectivesConfig) -> None:
    """Raises ValueError where an enabled objective needs a part that the model does not have, or
    leaves a parameter of the similarities without a gradient.
    """
    for name, what, has in _NEEDS:
        if getattr(objectives, name) and not has(model):
            raise ValueError(
                f"objectives.{name} needs {what}; preset {model.preset!r} has none, "
                f"{presets_with(has)}"
            )
    idle = model.scale != "none" and not (objectives.itc or objectives.sigmoid)
    if objectives.hinge and idle:
        plain = lambda config: config.scale == "none"
        raise ValueError(
            f"objectives.hinge takes cosines: the learned scale of preset {model.preset!r} would "
            "have no gradient. Set model.scale to 'none' and model.logit_bias to False, or train "
            f"itc or sigmoid too. A model of plain cosines: {presets_with(plain)}"
        )
