"""Which objectives are trained, with what weight, and their settings."""

from __future__ import annotations

from dataclasses import dataclass

LOSSES = ("itc", "itm", "mlm", "sigmoid", "hinge")


@dataclass(frozen=True)
class ObjectivesConfig:
    """Weights of the losses (0: off) and their settings.

    Attributes:
        itc: image-text contrast.
        sigmoid: image-text contrast pair by pair (SigLIP).
        hinge: triplets with a margin, summed over the batch (VSE++); `hinge_margin` in units of
            cosine. `hinge_hardest` counts the hardest negative of each query, else all (VSE0);
            also in the first `hinge_sum_steps` all count: from random weights the hardest alone
            draw all embeddings to one point.
        itm: image-text matching; one hard negative image and one hard negative text per pair.
        mlm: masked language modelling on the text that reads its image.
        label_smoothing: of the targets of `itc`.
        mlm_probability: share of tokens masked; `mlm_whole_word` masks whole words.
        momentum: decay of the teacher's weights per step; 0 trains without a teacher.
        queue_size: momentum embeddings kept as further contrastive candidates; needs a teacher.
        alpha: weight of the teacher's soft targets in ITC and MLM, reached linearly over
            `alpha_ramp_steps`.
    """

    itc: float = 1.0
    itm: float = 0.0
    mlm: float = 0.0
    sigmoid: float = 0.0
    hinge: float = 0.0
    hinge_margin: float = 0.2
    hinge_hardest: bool = True
    hinge_sum_steps: int = 0
    label_smoothing: float = 0.0
    mlm_probability: float = 0.15
    mlm_whole_word: bool = False
    momentum: float = 0.0
    queue_size: int = 0
    alpha: float = 0.0
    alpha_ramp_steps: int = 0

    def __post_init__(self) -> None:
        for name in (*LOSSES, "hinge_margin", "hinge_sum_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"objectives.{name} must be >= 0, got {getattr(self, name)}")
        if not self.weights:
            raise ValueError(f"objectives: at least one of {', '.join(LOSSES)} must be > 0")
        if self.itm and not self.itc:
            raise ValueError(
                "objectives.itm draws its negatives from itc's similarities: set objectives.itc > 0"
            )
        if self.momentum and not (self.itc or self.mlm):
            raise ValueError("objectives.momentum: only itc and mlm learn from a teacher")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"objectives.momentum must be in [0, 1), got {self.momentum}")
        if (self.queue_size or self.alpha) and not self.momentum:
            raise ValueError(
                "objectives.queue_size and objectives.alpha need a teacher: "
                "set objectives.momentum > 0"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each enabled objective."""
        return {name: w for name in LOSSES if (w := getattr(self, name)) > 0}

    def alpha_at(self, step: int) -> float:
        """Weight of the teacher's targets at optimizer step `step` (ALBEF ramps it over the first
        epoch).
        """
        return (
            self.alpha * min(1.0, step / self.alpha_ramp_steps)
            if self.alpha_ramp_steps
            else self.alpha
        )
