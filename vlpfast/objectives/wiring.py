"""The errors where a model does not have what an objective needs of it."""

from __future__ import annotations

from vlpfast.models.config import ModelConfig
from vlpfast.models.presets import missing
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.objectives.plan import Plan
from vlpfast.objectives.table import OBJECTIVES


def check_wiring(model: ModelConfig, objectives: ObjectivesConfig) -> None:
    """Raises ValueError where an enabled objective needs a part that the model does not have, or
    leaves a parameter of the similarities without a gradient.
    """
    needs = [(name, part) for name in objectives.weights for part in OBJECTIVES[name].needs]
    needs += [("mlm_causal", "one stack for both")] if objectives.mlm_causal else []
    for name, part in needs:
        if part not in model.parts:
            raise ValueError(f"objectives.{name} needs {part}; {missing(model.preset, part)}")
    about_two = model.answers and model.answer_images > 1
    alone = objectives.weights.keys() == {"qa"} and objectives.masking == "apart"
    if about_two and not alone:
        raise ValueError(
            "questions about two images (model.answer_images) train objectives.qa alone, with "
            f"objectives.masking 'apart', got {sorted(objectives.weights)}, {objectives.masking!r}"
        )
    fusion = model.fusion
    rows = Plan.of(objectives, one_stack=model.one_stack)
    staged = fusion.relative_bias or fusion.joint_experts
    if staged and rows.reads_alone and len(rows.fusion) > 1:
        raise ValueError(
            "objectives.mtm and objectives.mim read one modality alone: they train preset "
            f"{model.preset!r}, which has fusion.relative_bias or fusion.joint_experts, in stages "
            "of their own, without each other, itm, mlm and mvm"
        )
    if objectives.hides_patches and (model.vision.patch_dropout or model.vision.max_patches):
        raise ValueError(
            "objectives.mim, mvm and mpp hide patches of whole images: "
            "model.vision.patch_dropout and model.vision.max_patches must be 0"
        )
    idle = "a learned scale" in model.parts and not (objectives.itc or objectives.sigmoid)
    if objectives.hinge and idle:
        raise ValueError(
            f"objectives.hinge takes cosines: the learned scale of preset {model.preset!r} would "
            "have no gradient. Set model.scale to 'none' and model.logit_bias to False (as preset "
            "'vse++' has them), or train itc or sigmoid too"
        )
